"Every field of a run refuses what it cannot use or keep, by its name: otherwise the run can be written to JSON and read again"

import dataclasses
import json
import typing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_runs import TINY, tiny_run

from internlm_nb.base.values import check_fields, check_range, fault
from internlm_nb.train.config import ParallelConfig, RunConfig, TrainConfig, ZeroConfig, flatten, from_dict, to_dict
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.precision import LossScaleConfig

RUN = tiny_run(replace(TINY, num_experts=4))
NAMES = [name for name, _ in flatten(RUN)]
BAD = [
    float("nan"), float("inf"), -float("inf"), -1, -1.0, -1e300, 0, 2**31, 2**63, -(2**63) - 1, 10**400, 10**5000, 1e300, 1.5, True, None, "", "x", "a\0b", "\ud800", "../x", "x" * 5000,
    b"x", 3 + 1j, object(), [], ["x"], (), ("x",), (1,), (None,), {}, {"a": 1}, np.int64(3), np.float32(3), np.float64("nan"), np.array([1.0]), RUN, set(), range(3),
]  # fmt: skip


def with_value(config: typing.Any, name: str, value: object) -> typing.Any:
    "The tree with one leaf changed"
    first, _, rest = name.partition(".")
    return replace(config, **{first: with_value(getattr(config, first), rest, value) if rest else value})


def says(error: BaseException, name: str) -> bool:
    "Does a message name the field, as Python or the command line spells it?"
    leaf = name.rpartition(".")[2]
    return leaf in str(error) or leaf.replace("_", "-") in str(error)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    value=st.sampled_from(range(len(BAD))) | st.floats() | st.integers() | st.text(max_size=5),
)
def test_a_field_refuses_or_keeps(name, value):
    refuses_or_keeps(name, BAD[value] if isinstance(value, int) and 0 <= value < len(BAD) else value)


def refuses_or_keeps(name: str, value: object) -> None:
    try:
        run = with_value(RUN, name, value)
    except ValueError as error:
        assert says(error, name), (name, value, error)
        return
    text = json.dumps(to_dict(run), allow_nan=False, ensure_ascii=False)
    text.encode()
    assert from_dict(RunConfig, json.loads(text)) == run


@pytest.mark.parametrize("name", NAMES)
def test_every_field_and_every_bad_value(name):
    for value in BAD:
        refuses_or_keeps(name, value)


@pytest.mark.parametrize("section", [f.name for f in dataclasses.fields(RUN) if f.name != "name"])
def test_a_section_is_one(section):
    "What is no dataclass of its kind is refused, by name"
    for value in (None, 3, {}, RUN, "x"):
        with pytest.raises(ValueError, match=f"--{section}"):
            replace(RUN, **{section: value})


def test_what_trains_badly_is_refused():
    "An epsilon that fp32 takes for 0, a scale beyond fp32, a limit that is none"
    for make, words in (
        (lambda: OptimConfig(eps=0.0), "--optim.eps is 0.0"),
        (lambda: OptimConfig(eps=1e-60), "--optim.eps is 1e-60"),
        (lambda: LossScaleConfig(max=1e39), "--train.loss-scale.max"),
        (
            lambda: TrainConfig(max_minutes=float("inf")),
            r"--train.max-minutes is inf: a finite number is needed \(0 means no limit\)",
        ),
        (lambda: ParallelConfig(timeout=1e12), "--parallel.timeout"),
        (lambda: ParallelConfig(bucket_mb=1e300), "--parallel.bucket-mb"),
        (lambda: replace(TINY, mlp_ratio=1e300), "mlp_ratio"),
        (lambda: replace(TINY, num_layers=10**6), "num_layers is 1000000: it must be at most 10,000"),
        (lambda: ZeroConfig(param=2, grad=3, optim=8), "write --zero.param 2 --zero.grad 4 --zero.optim 8"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    OptimConfig(eps=1e-30)
    LossScaleConfig(max=2.0**100)


def test_the_check_sees_types_inside_of_types():
    assert fault(tuple[typing.Literal["a", "b"], ...], ("a", "c")) and not fault(
        tuple[typing.Literal["a", "b"], ...], ("a", "b")
    )
    assert fault(int | None, "x") and fault(int | None, 1.0) and not fault(int | None, None) and fault(int, None)
    assert fault(bool, 1) and fault(typing.Literal[1], True) and not fault(float, 3)


@dataclasses.dataclass(frozen=True)
class Pair:
    least: float = 0.0
    names: tuple[str, ...] = ()

    def __post_init__(self):
        check_fields(self, "--pair.")
        check_range(self, "--pair.", ["least"], 0, 10, above=False)


def test_limits_belong_to_what_they_limit():
    assert Pair(10).least == 10 and Pair(0).least == 0 and Pair(names=["a"]).names == ("a",)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--pair\.least is 10\.5: give at most 10"):
        Pair(10.5)
    with pytest.raises(ValueError, match=r"--pair\.least is -0\.1: give at least 0"):
        Pair(-0.1)

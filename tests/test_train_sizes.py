"What is reckoned from a run alone is what an engine that was built says of itself, on any rank of any world"

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm_nb import (
    Layout,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    Transformer,
    ZeroConfig,
    preset,
)
from internlm_nb.data.config import DataConfig
from internlm_nb.model.params import parameter_shapes
from internlm_nb.parallel.layout import Coords
from internlm_nb.parallel.mesh import Place, destroy, init_distributed, make_mesh
from internlm_nb.train.options import ELEMENT_BYTES
from internlm_nb.train.parallelize import build, layout_of
from internlm_nb.train.precision import PRECISIONS
from internlm_nb.train.sizes import engine_sizes, most_memory, state_memory
from internlm_nb.zero.formulas import sizes_of

DENSE = dict(vocab_size=64, hidden_size=32, num_layers=5, num_heads=4, num_kv_heads=4, mlp_ratio=2.0, multiple_of=8)
MIXTURE = dict(num_experts=4, experts_per_token=2, num_shared_experts=1)
AXES = [
    dict(),
    dict(tensor=2),
    dict(sequence=2),
    dict(pipeline=2),
    dict(pipeline=2, schedule="zbv", chunks=2),
    dict(pipeline=2, schedule="interleaved", chunks=2, tensor=2),
    dict(expert=2),
    dict(expert=2, tensor=2, mode="msp"),
    dict(expert=4, pipeline=2),
]
FROZEN = [
    (),
    ("embedding.*",),
    ("blocks.0.*", "blocks.1.ffn_norm.*"),
    ("*.experts.*", "head.norm.*"),
    ("*norm.weight",),
]


@pytest.mark.parametrize("family", ["internlm", "internlm2", "llama"])
@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True), MIXTURE, {**MIXTURE, "num_shared_experts": 0}])
def test_the_table_of_parameters_is_the_model(family, changes):
    cfg = ModelConfig(family, **{**DENSE, **changes}, qkv_bias=family == "internlm", out_bias=family == "internlm")
    want = {name: tuple(p.shape) for name, p in Transformer(cfg, device="meta").named_parameters()}
    assert parameter_shapes(cfg) == want and list(parameter_shapes(cfg)) == list(want)


@st.composite
def drawn(draw) -> tuple[RunConfig, int, int]:
    "A run, the ranks of its world, and one of them"
    axes = draw(st.sampled_from(AXES))
    parallel = ParallelConfig(**axes, bucket_mb=draw(st.sampled_from([0.001, 0.02, 32.0])))  # type: ignore[arg-type]
    whole = parallel.tensor * parallel.sequence * parallel.pipeline * parallel.expert
    data = draw(st.sampled_from([1, 2, 4]))
    same = data * parallel.expert * parallel.sequence  # ranks with the same weights
    chain = sorted(draw(st.lists(st.sampled_from([1, 2, 4]), min_size=3, max_size=3)))
    zero = ZeroConfig(
        *(min(n, same) for n in chain),
        reshard=draw(st.sampled_from(["forward", "backward", "step", "never"])),
        grad_dtype=draw(st.sampled_from(["master", "param"])),
    )
    tied = draw(st.booleans())
    model = ModelConfig(
        "internlm2", **{**DENSE, **(MIXTURE if parallel.expert > 1 or draw(st.booleans()) else {})}, tie_embeddings=tied
    )
    frozen = draw(st.sampled_from(FROZEN if model.num_experts else [f for f in FROZEN if "*.experts.*" not in f]))
    if tied and frozen and frozen[0] in ("embedding.*",):
        frozen = ()
    run = RunConfig(
        "x",
        model,
        data=DataConfig(seq_len=32, micro_num=4 * data * parallel.expert),
        optim=OptimConfig(frozen=frozen),
        train=TrainConfig(precision=draw(st.sampled_from(["float32", "bfloat16"])), device="cpu"),
        parallel=parallel,
        zero=zero,
    )
    world = whole * data
    return run, world, draw(st.integers(0, world - 1))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn())
def test_sizes_from_a_run_are_those_of_an_engine(case):
    run, world, rank = case
    layout: Layout = layout_of(run, world)
    init_distributed("fake", place=Place(rank, world, 0))
    try:
        engine = build(run, make_mesh(layout)).engine
        assert engine_sizes(run, layout, layout.coords(rank)) == sizes_of(engine)
    finally:
        destroy()


def test_a_wrong_buffer_would_be_seen():
    run = RunConfig("x", ModelConfig("internlm2", **DENSE), zero=ZeroConfig(1, 1, 2))  # type: ignore[arg-type]
    layout = Layout(2)
    other = replace(run, zero=ZeroConfig(1, 2, 2))
    assert engine_sizes(run, layout, layout.coords(0)) != engine_sizes(other, layout, layout.coords(0))


@pytest.mark.parametrize(
    "zero, parallel, world, want",
    [
        (dict(param=8, grad=8, optim=64), {}, 1024, [13.11]),
        (dict(grad=8, optim=64), {}, 1024, [24.68]),
        (dict(param=8, grad=8, optim=64, reshard="step"), {}, 1024, [26.51]),
        (dict(optim=8), {}, 1024, [54.91]),
        (dict(optim=8), dict(pipeline=4), 1024, [15.31, 12.14, 12.14, 15.31]),
        (dict(optim=8), dict(pipeline=4, schedule="zbv", chunks=2), 1024, [18.48, 12.14, 12.14, 12.14]),
    ],
)
def test_memory_is_what_traces_of_the_real_step_weighed(zero, parallel, world, want):
    "GB of internlm-7b before activations, as a trace of the whole step on meta tensors found them in each stage"
    run = RunConfig("x", preset("internlm-7b"), zero=ZeroConfig(**zero), parallel=ParallelConfig(**parallel))
    layout = Layout(world, pipeline=run.parallel.pipeline)
    found = [state_memory(run, layout, Coords(pipeline=rank)).device / 1e9 for rank in range(layout.pipeline)]
    assert [round(gb, 2) for gb in found] == want
    assert most_memory(run, layout).device == max(round(gb * 1e9) for gb in found)


def test_bytes_of_each_precision_are_those_of_its_dtypes():
    assert ELEMENT_BYTES == {name: (p.param.itemsize, p.master.itemsize) for name, p in PRECISIONS.items()}


def test_states_in_the_host_are_counted_there():
    "GB, by the same trace"
    run = RunConfig("x", preset("internlm-7b"), zero=ZeroConfig(offload=True))
    memory = most_memory(run, Layout(1))
    assert round(memory.host / 1e9, 1) == 87.9 and round((memory.device - memory.moving) / 1e9, 2) == 43.93

"""Hybrid ZeRO: any (p, g, o) is the same computation. In float64 three steps' losses, norms and weights equal one process's to 1e-10

CI: four ranks, several cases to a group of processes. All factors on eight ranks, and all compositions: pytest -m slow tests/test_zero_hybrid.py
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from test_parallel_law import draw, told

from internlm_nb.data.loader import DataConfig, Loader
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.transformer import parameter_names
from internlm_nb.parallel.batch import Batch
from internlm_nb.parallel.mesh import Mesh, make_mesh, single
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.train.config import ParallelConfig, RunConfig, TrainConfig, ZeroConfig
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.parallelize import build_model, layout_of, make_optimizer
from internlm_nb.train.precision import PRECISIONS, LossScale
from internlm_nb.train.schedules import ScheduleConfig
from internlm_nb.train.step import train_step
from internlm_nb.zero.sharding import Sharding, shardings

STEPS = 3


def run_of(
    micro_num: int,
    precision: str = "float64",
    parallel: ParallelConfig | None = None,
    recompute: tuple[float, str] = (0.0, "full"),
    optim: dict[str, Any] | None = None,
    **model: Any,
) -> RunConfig:
    "A tiny run with odd sizes, so that slices end inside of parameters"
    cfg = ModelConfig(
        family="internlm2",
        **{
            **dict(
                vocab_size=56,
                hidden_size=32,
                num_layers=3,
                num_heads=4,
                num_kv_heads=4,
                mlp_ratio=2.0,
                multiple_of=8,
                max_position_embeddings=16,
            ),
            **model,
        },
    )
    data = DataConfig(seq_len=16, micro_bsz=1, micro_num=micro_num, synthetic_shortest=2, prefetch=0)
    training = TrainConfig(
        steps=STEPS, precision=precision, seed=1, device="cpu", recompute=recompute[0], recompute_policy=recompute[1]
    )  # type: ignore[arg-type]
    rates = OptimConfig(
        **{
            **dict(
                lr=3e-4,
                clip=0.05,
                schedule=ScheduleConfig(kind="constant", warmup_ratio=0.0),
                no_decay=("*norm.weight",),
                own_lr=("head.weight=1e-4",) if not model.get("tie_embeddings") else (),
            ),
            **(optim or {}),
        }
    )
    return RunConfig("zero", cfg, data, rates, training, parallel=parallel or ParallelConfig())


def make(
    mesh: Mesh,
    run: RunConfig,
    sharding: Sharding | None = None,
    overlap: bool = True,
    bucket_mb: float = 0.0,
    **options: Any,
):
    "Model, optimizer and placements; each module a unit of its own, unless `bucket_mb` joins them"
    precision = PRECISIONS[run.train.precision]
    model, placements = build_model(run, mesh)
    scale = LossScale(run.train.loss_scale, mesh.device, enabled=precision.loss_scale)
    zero = ZeroConfig(*(sharding or Sharding()).factors, **options)
    opt = make_optimizer(
        model, run.optim, precision, mesh, zero, placements, scale, parameter_names(run.model), bucket_mb, overlap
    )
    return model, opt, placements


def train(mesh: Mesh, run: RunConfig, sharding: Sharding | None = None, steps: int = STEPS, **options: Any):
    "Losses and norms of some steps, and this rank's part of the last weights, whole again"
    model, opt, placements = make(mesh, run, sharding, **options)
    loader, data, figures = Loader(run.data, run.train.seed, run.model.vocab_size), mesh.axis("data"), []
    for step in range(steps):
        opt.set_schedule(step, steps)
        batches = [Batch.of(p, mesh=mesh) for p in loader.batch(step, data.coord, data.size)]
        out = train_step(model, opt, batches, sum(b.num_targets for b in batches), mesh=mesh)
        figures.append((out.loss.item(), out.grad_norm.item()))
        mesh.check_waited()
    with opt.engine.gathered():
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    mesh.check_waited()
    opt.engine.remove()
    return figures, weights, placements


def cases(mesh: Mesh, run: RunConfig, which: list[Sharding], options: list[dict[str, Any]]):
    "Several trainings by one group of processes"
    return [train(mesh, run, s, **o) for s in which for o in options]


def same(alone, got, tolerance: float = 1e-10) -> None:
    "Equal losses, norms and weights"
    for (loss, norm), (loss1, norm1) in zip(alone[0], got[0]):
        assert abs(loss1 - loss) <= tolerance * abs(loss)
        assert abs(norm1 - norm) <= tolerance * norm
    for name, place in got[2].items():
        assert (got[1][name] - place.cut(alone[1][name])).abs().max() <= tolerance, name


def hold(
    run: RunConfig, world: int, which: list[Sharding], options: list[dict[str, Any]], timeout: float = 120
) -> None:
    "The law, for some shardings of one run"
    alone = train(single(), replace(run, parallel=ParallelConfig()))
    ranks = run_ranks(cases, layout_of(run, world), run, which, options, timeout=timeout)
    names = set()
    for results in ranks:
        for got in results:
            same(alone, got)
            names |= got[1].keys()
    assert names == alone[1].keys()


AHEAD, AT_ONCE = dict(check=True), dict(overlap=False)


@pytest.mark.slow
@pytest.mark.parametrize("micro,options", [(m, [AHEAD, AT_ONCE]) for m in (1, 3)])
def test_all_factors_on_two_ranks(micro, options):
    hold(run_of(2 * micro), 2, shardings(2), options)


@pytest.mark.parametrize(
    "micro,options", [(2, [AHEAD]), *(pytest.param(m, [AHEAD, AT_ONCE], marks=pytest.mark.slow) for m in (1, 3))]
)
def test_all_factors_on_four_ranks(micro, options):
    hold(run_of(4 * micro), 4, shardings(4), options)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 3])
def test_all_factors_on_eight_ranks(micro):
    hold(run_of(8 * micro), 8, shardings(8), [AHEAD, AT_ONCE], timeout=580)


MOE: dict[str, Any] = dict(
    num_experts=4, experts_per_token=2, num_shared_experts=1, capacity_factor=1.0, aux_loss_coef=0.05, z_loss_coef=0.01
)
COMPOSED: dict[str, tuple[RunConfig, int]] = {  # a run, and Z of its weights
    "msp": (run_of(4, parallel=ParallelConfig(tensor=2, mode="msp"), recompute=(1.0, "full")), 2),
    "mtp": (run_of(4, parallel=ParallelConfig(tensor=2, mode="mtp"), tie_embeddings=True), 2),
    "fsp": (run_of(4, parallel=ParallelConfig(tensor=2, mode="fsp"), recompute=(0.7, "selective")), 2),
    "sequence": (run_of(4, parallel=ParallelConfig(sequence=2), recompute=(1.0, "selective")), 4),
    "context": (run_of(4, parallel=ParallelConfig(context=2), tie_embeddings=True, recompute=(1.0, "full")), 4),
    "1f1b": (run_of(6, parallel=ParallelConfig(pipeline=2), tie_embeddings=True, num_layers=4), 2),
    "interleaved": (
        run_of(
            8,
            parallel=ParallelConfig(pipeline=2, schedule="interleaved", chunks=2),
            num_layers=4,
            recompute=(1.0, "full"),
        ),
        2,
    ),
    "zbh1": (run_of(6, parallel=ParallelConfig(pipeline=2, schedule="zbh1"), num_layers=4, recompute=(0.5, "full")), 2),
    "zbv": (
        run_of(10, parallel=ParallelConfig(pipeline=2, schedule="zbv", chunks=2), tie_embeddings=True, num_layers=4),
        2,
    ),
    "zbv-msp": (
        run_of(4, parallel=ParallelConfig(tensor=2, mode="msp", pipeline=2, schedule="zbv", chunks=2), num_layers=4),
        1,
    ),
    "expert": (run_of(8, parallel=ParallelConfig(expert=2), recompute=(0.7, "full"), **MOE), 4),
    "expert-pipeline": (
        run_of(8, parallel=ParallelConfig(expert=2, pipeline=2, schedule="zbh1"), num_layers=4, **MOE),
        2,
    ),
    "expert-msp": (run_of(4, parallel=ParallelConfig(expert=2, tensor=2, mode="msp"), **MOE), 2),
    "frozen": (
        run_of(
            4, optim=dict(frozen=("embedding.*", "blocks.0.*", "blocks.1.ffn_norm.weight")), recompute=(1.0, "full")
        ),
        4,
    ),
}
RESHARD: list[dict[str, Any]] = [
    dict(check=True),
    dict(reshard="step", overlap=False),
    dict(reshard="never"),
    dict(reshard="backward", check=True),
]


def composed(which: list[tuple[str, Sharding, dict[str, Any]]]):
    "Several layouts by one group of processes"
    return [
        train(make_mesh(layout_of(COMPOSED[name][0], 4)), COMPOSED[name][0], sharding, **options)
        for name, sharding, options in which
    ]


@pytest.mark.parametrize("half", [0, 1])
def test_composed(half):
    "With every other axis, one choice of each: a middle sharding in check mode, or the innermost with other options"
    which = []
    for i, name in list(enumerate(COMPOSED))[half::2]:
        some = shardings(COMPOSED[name][1])
        which.append((name, some[-1] if i % 4 < 2 else some[len(some) // 2], RESHARD[i // 2 % 4 if i % 3 else 0]))
    for results in zip(*run_ranks(composed, 4, which, timeout=200)):
        name = which.pop(0)[0]
        alone = train(single(), replace(COMPOSED[name][0], parallel=ParallelConfig()))
        for got in results:
            same(alone, got)
        assert set().union(*(got[1] for got in results)) == alone[1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSED)
def test_composed_all(name):
    run, z = COMPOSED[name]
    hold(run, 4, shardings(z), RESHARD, timeout=300)


def drawn(seed: int, most: int) -> tuple[RunConfig, int, Sharding, dict[str, Any]]:
    "A run over any axes, and a sharding of it"
    run, world = draw(seed, "float64", most)
    pick = random.Random(seed)
    sharding = pick.choice(shardings(layout_of(run, world).replica))
    options = dict(
        reshard=pick.choice(["forward", "forward", "backward", "step", "never"]),
        overlap=pick.random() < 0.7,
        check=pick.random() < 0.7,
    )
    options |= dict(bucket_mb=pick.choice([0.0, 0.02, 32.0]), offload=pick.random() < 0.2)
    if pick.random() < 0.3:
        run = replace(
            run,
            optim=replace(
                run.optim,
                frozen=pick.choice(
                    [("embedding.*",), ("*ffn_norm.weight",), ("head.norm.weight", "blocks.0.attention.*")]
                ),
            ),
        )
    return run, world, sharding, options


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_sweep(seed):
    run, world, sharding, options = drawn(seed, 8)
    print(sharding, options, told(run, world))
    hold(run, world, [sharding], [options])


def test_draws_reach_everything():
    draws = [drawn(seed, 8) for seed in range(100)]
    assert {(s.param > 1, s.grad > s.param, s.optim > s.grad) for _, _, s, _ in draws} >= {
        (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True) if not (a and b and c)
    }
    assert {o["reshard"] for *_, o in draws} == {"forward", "backward", "step", "never"}
    assert {r.parallel.schedule for r, world, s, _ in draws if r.parallel.pipeline > 1 and s.optim > 1} == {
        "1f1b",
        "interleaved",
        "zbh1",
        "zbv",
    }
    assert {(r.parallel.expert > 1, s.param > 1) for r, _, s, _ in draws} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    assert {bool(r.optim.frozen) for r, *_ in draws} == {True, False}

"""Law 2: any layout is the same computation. Layouts, modes, models and batches are drawn; three steps of each are compared with one process's.

In float64 loss, norm, gradients and weights agree to 1e-10. In float32 the loss agrees to 1e-5 relative, each gradient to 1e-5 of its largest element, and the weights after three steps to
1e-5 at lr <= 3e-4: Adam divides rounding noise by tiny gradients, so more cannot be promised. CI draws a few; all of them: pytest -m slow tests/test_parallel_law.py
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from internlm_nb.data.loader import DataConfig, Loader
from internlm_nb.model.config import Family, ModelConfig
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.mesh import Mesh, single
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.train.config import ParallelConfig, RunConfig, TrainConfig
from internlm_nb.train.optim import OptimConfig, Optimizer
from internlm_nb.train.parallelize import build_model, layout_of
from internlm_nb.train.precision import PRECISIONS, PrecisionName
from internlm_nb.train.schedules import ScheduleConfig
from internlm_nb.train.step import Batch, train_step

STEPS = 3
FAMILIES: dict[Family, dict[str, Any]] = {
    "internlm": dict(qkv_bias=True, out_bias=True, rope_scaling="dynamic", mlp_ratio=8 / 3),
    "internlm2": dict(mlp_ratio=3.5),
    "internlm3": dict(mlp_ratio=2.5),
    "llama": dict(mlp_ratio=8 / 3),
}


def draw(seed: int, precision: PrecisionName, most: int = 8) -> tuple[RunConfig, int]:
    "A run and a number of ranks that fits it"
    pick = random.Random(f"{precision} {seed}")
    world = pick.choice([n for n in (2, 4, 8) if n <= most])
    tensor = pick.choice([n for n in (1, 2, 4) if n <= world])
    data = world // tensor
    family = pick.choice(list(FAMILIES))
    model = ModelConfig(
        family=family, vocab_size=8 * pick.randint(6, 12), hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=pick.choice([n for n in (1, 2, 4) if n % tensor == 0]), multiple_of=16,
        norm_head=pick.random() < 0.3, tie_embeddings=pick.random() < 0.3, qk_interleaved=pick.random() < 0.3, embed_grad_scale=pick.choice([1.0, 0.3]), max_position_embeddings=16,
        **FAMILIES[family],
    )  # fmt: skip
    reading = DataConfig(
        seq_len=4 * pick.randint(3, 8),
        micro_bsz=pick.randint(1, 2),
        micro_num=data * pick.randint(1, 3),
        pack_sample_into_one=pick.random() < 0.3,
        synthetic_shortest=2,
        prefetch=0,
    )
    training = TrainConfig(
        steps=STEPS,
        precision=precision,
        seed=seed,
        device="cpu",
        recompute=pick.choice([0.0, 0.5, 1.0]),
        recompute_policy=pick.choice(["full", "selective"]),
        label_smoothing=pick.choice([0.0, 0.1]),
    )
    optim = OptimConfig(
        lr=3e-4,
        clip=pick.choice([0.0, 0.05, 1.0]),
        schedule=ScheduleConfig(kind="constant", warmup_ratio=0.0),
        no_decay=("*norm.weight",) if pick.random() < 0.5 else (),
    )
    parallel = ParallelConfig(tensor=tensor, mode=pick.choice(["mtp", "msp", "fsp"]), bucket_mb=pick.choice([0.002, 0.02, 32.0]))
    return RunConfig("law", model, reading, optim, training, parallel=parallel), world


def three_steps(mesh: Mesh, run: RunConfig):
    "Losses and norms of three steps, the first step's gradients, the last weights; and which part of each is here"
    precision = PRECISIONS[run.train.precision]
    model, placements = build_model(run, mesh)
    opt = Optimizer(model, run.optim, precision, None, mesh, placements, int(run.parallel.bucket_mb * 2**20))
    loader, data = Loader(run.data, run.train.seed, run.model.vocab_size), mesh.axis("data")
    figures, first = [], {}
    for step in range(STEPS):
        opt.set_schedule(step, STEPS)
        batches = [Batch.of(p) for p in loader.batch(step, data.coord, data.size)]
        out = train_step(model, opt, batches, sum(b.num_targets for b in batches), mesh=mesh)
        figures.append((out.loss.item(), out.grad_norm.item()))
        assert not out.skipped
        if step == 0:
            first = {n: m.grad.clone() for n, m in opt.masters.items() if m.grad is not None}
    mesh.check_waited()
    return figures, first, {n: m.detach().clone() for n, m in opt.masters.items()}, placements


def hold(run: RunConfig, world: int) -> None:
    "The law, for one draw"
    exact = run.train.precision == "float64"
    loss_tolerance, grad_tolerance, weight_tolerance = (1e-10, 1e-10, 1e-10) if exact else (1e-5, 1e-5, 1e-5)
    alone = replace(run, parallel=ParallelConfig())
    figures, grads, weights, _ = three_steps(single(), alone)
    for rank, (got, first, last, placements) in enumerate(run_ranks(three_steps, layout_of(run, world), run, timeout=120)):
        for (loss, norm), (loss1, norm1) in zip(figures, got):
            assert abs(loss1 - loss) <= loss_tolerance * abs(loss), (rank, loss, loss1)
            assert abs(norm1 - norm) <= 1e-4 * norm if not exact else abs(norm1 - norm) <= 1e-10 * norm, (rank, norm, norm1)
        assert first.keys() == grads.keys() == last.keys()
        for name, place in placements.items():
            whole = grads[name]
            assert (first[name] - place.cut(whole)).abs().max() <= grad_tolerance * whole.abs().max(), (rank, name)
            assert (last[name] - place.cut(weights[name])).abs().max() <= weight_tolerance, (rank, name)


def told(run: RunConfig, world: int) -> str:
    "A draw in a line, for a failure's report"
    p = run.parallel
    return f"world {world} tensor {p.tensor} {p.mode}, {run.model}, {run.data}, recompute {run.train.recompute} {run.train.recompute_policy}, bucket {p.bucket_mb}, {run.optim}"


@pytest.mark.parametrize("precision,seed", [*(("float64", s) for s in range(4)), *(("float32", s) for s in range(3))])
def test_law_2_sample(precision, seed):
    run, world = draw(seed, precision, most=4)
    print(told(run, world))
    hold(run, world)


@pytest.mark.parametrize("mode", ["mtp", pytest.param("msp", marks=pytest.mark.slow), pytest.param("fsp", marks=pytest.mark.slow)])
def test_law_2_on_eight_ranks(mode):
    "Four ways tensor, two ways data; in CI one mode"
    run, _ = draw(0, "float64")
    run = replace(run, model=replace(run.model, num_kv_heads=4), data=replace(run.data, micro_num=4), parallel=replace(run.parallel, tensor=4, mode=mode))
    hold(run, 8)


def test_draws_reach_everything():
    "A sweep that never drew a thing would say nothing about it"
    precisions: list[PrecisionName] = ["float64", "float32"]
    drawn = [draw(seed, precision) for seed in range(100) for precision in precisions]
    assert {(w, r.parallel.tensor) for r, w in drawn} == {(w, t) for w in (2, 4, 8) for t in (1, 2, 4) if t <= w}
    assert {(r.parallel.tensor > 1, r.parallel.mode, r.model.family) for r, _ in drawn} == {
        (s, m, f) for s in (False, True) for m in ("mtp", "msp", "fsp") for f in FAMILIES
    }
    for fact in ("norm_head", "tie_embeddings", "qk_interleaved", "num_kv_heads", "embed_grad_scale"):
        assert len({(getattr(r.model, fact), r.parallel.mode) for r, _ in drawn if r.parallel.tensor > 1}) >= 6
    assert all(layout_of(r, w).world == w for r, w in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_law_2_sweep(precision, seed):
    run, world = draw(seed, precision)
    print(told(run, world))
    hold(run, world)


def _wrong(mesh: Mesh, run: RunConfig):
    "The same, with a maximum over ranks instead of the sum: the law must notice"
    import internlm_nb.parallel.data as data

    real = data.start_all_reduce
    data.start_all_reduce = lambda x, axis, purpose: real(x, axis, purpose, "max")
    return three_steps(mesh, run)


def test_the_law_can_be_broken():
    run, _ = draw(3, "float64", most=2)
    run = replace(run, parallel=ParallelConfig(), data=replace(run.data, micro_num=2))
    _, grads, _, _ = three_steps(single(), run)
    _, first, _, _ = run_ranks(_wrong, Layout(2), run)[0]
    assert max(((first[n] - grads[n]).abs().max() / grads[n].abs().max()).item() for n in grads) > 1e-2

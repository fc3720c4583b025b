"Any schedule over any number of ranks is the computation of one process; it holds and sends what was calculated beforehand, and no more"

from __future__ import annotations

import random
import time
import weakref
import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from internlm_nb.model.config import ModelConfig, family_defaults
from internlm_nb.model.init import allocate
from internlm_nb.model.loss import LossOutput
from internlm_nb.model.segments import Segments
from internlm_nb.model.transformer import Transformer, recompute
from internlm_nb.parallel.comm import Axis, all_reduce, start_send_receive
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.mesh import Mesh, Place, destroy, init_distributed, make_mesh, single
from internlm_nb.parallel.messages import check_schedule
from internlm_nb.parallel.pipeline import run_schedule
from internlm_nb.parallel.placement import Placement, add_up, placements_of
from internlm_nb.parallel.ranks import RankError, run_ranks
from internlm_nb.parallel.record import Recorder
from internlm_nb.parallel.schedules import Schedule, ScheduleError, evaluation_schedule, make_schedule
from internlm_nb.parallel.split_backward import WeightQueue
from internlm_nb.parallel.stages import defer_weights, expected_gradients, pipeline_cut, split_layers, tied_ranks
from internlm_nb.parallel.tensor import tensor_parallel
from internlm_nb.parallel.timeline import timeline
from internlm_nb.parallel.traffic import by_purpose, pipeline_traffic
from internlm_nb.train.parallelize import units_of
from internlm_nb.zero.hybrid import ExtraSum, HybridZero

PACKS = ((7, 1, 12, 4), (16,), (3, 29), (5, 5, 5, 5), (40,), (1, 7))  # documents of packs, of different lengths


@dataclass(frozen=True)
class Pack:
    input_ids: Tensor
    labels: Tensor
    indexes: Tensor
    segments: Segments


def config(**changes) -> ModelConfig:
    sizes: dict = dict(
        vocab_size=64,
        hidden_size=32,
        num_layers=7,
        num_heads=4,
        num_kv_heads=2,
        mlp_ratio=2.0,
        multiple_of=8,
        norm_head=True,
    )
    return ModelConfig(**{**family_defaults("internlm2"), **sizes, **changes})


PLAIN = config()
BIASES = config(family="internlm", qkv_bias=True, out_bias=True, norm_head=False, num_kv_heads=4)
TIED = config(tie_embeddings=True, embed_grad_scale=0.5, norm_head=False)


def packs(count: int) -> list[Pack]:
    "Micro-batches of different shapes; some tokens have no target"
    out = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        segments = Segments.from_lengths(PACKS[i % len(PACKS)])
        ids, labels = (torch.randint(64, (segments.tokens,), generator=g) for _ in range(2))
        labels[torch.rand(segments.tokens, generator=g) < 0.2] = -100
        out.append(Pack(ids, labels, segments.indexes(), segments))
    return out


def fill(model: nn.Module, placements: dict[str, Placement], dtype: torch.dtype = torch.float64) -> None:
    "Every parameter random by its logical name, so that each has a gradient that can be wrong"
    with torch.no_grad():
        for name, p in model.named_parameters():
            place = placements[name]
            whole = torch.randn(
                place.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64
            )
            p.copy_(place.cut(1 + 0.2 * whole if name.endswith("norm.weight") else 0.15 * whole))


def alone(cfg: ModelConfig, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    "Loss and gradients of one process that knows no stages"
    model = Transformer(cfg, dtype=torch.float64)
    fill(model, placements_of(model))
    total = torch.zeros((), dtype=torch.float64)
    for b in packs(count):
        out = model(b.input_ids, b.segments, b.indexes, labels=b.labels)
        assert isinstance(out, LossOutput)
        (out.loss_sum / 100).backward()
        total += out.loss_sum.detach()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def make_part(
    mesh: Mesh,
    cfg: ModelConfig,
    schedule,
    policy: str = "none",
    dtype: torch.dtype = torch.float64,
    queue: WeightQueue | None = None,
):
    "This rank's part, ready to run"
    axis, tensor = mesh.axis("pipeline"), mesh.axis("tensor")
    part = pipeline_cut(Transformer(cfg, device="meta", dtype=dtype), schedule, axis.coord)
    placements = tensor_parallel(part, tensor, mesh.layout.mode)
    allocate(part, "cpu")
    fill(part, placements)
    recompute(part, 0.0 if policy == "none" else 1.0, "full" if policy == "none" else policy)  # type: ignore[arg-type]
    if queue is not None:
        defer_weights(part, queue)
    return part, placements


def sum_tied(grads: dict[str, Tensor], cfg: ModelConfig, schedule: Schedule, axis: Axis) -> None:
    "What the engine does with a tied embedding's gradient"
    add_up(
        [g for name, g in grads.items() if name == "embedding.weight"],
        axis,
        "tied gradients",
        tied_ranks(cfg, schedule),
    )


def piped(mesh: Mesh, cases: list[tuple]) -> list[dict]:
    "Each case on this rank: (config, schedule's arguments, recomputation)"
    results = []
    for cfg, arguments, policy in cases:
        schedule = arguments if isinstance(arguments, Schedule) else make_schedule(*arguments)
        count = schedule.micro_num
        axis, tensor = mesh.axis("pipeline"), mesh.axis("tensor")
        queue = WeightQueue() if schedule.split else None
        part, placements = make_part(mesh, cfg, schedule, policy, queue=queue)
        split = tensor.size if mesh.layout.mode != "mtp" else 1
        plan, losses = check_schedule(schedule), {}
        if mesh.recorder is not None:
            mesh.recorder.reset()
        ran = run_schedule(
            part,
            plan,
            packs(count),
            axis,
            lambda i, out: out.loss_sum / 100,
            lambda i, out, losses=losses: losses.update({i: out.loss_sum}),
            queue=queue,
            split=split,
        )
        mesh.check_waited()
        counts = (
            {key[1]: replace(c) for key, c in mesh.recorder.counts.items() if key[0] == "pipeline"}
            if mesh.recorder
            else {}
        )
        grads = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
        assert set(grads) == set(placements) == set(expected_gradients(part, count))
        add_up([g for name, g in grads.items() if placements[name].partial], tensor, "partial gradients")
        sum_tied(grads, cfg, schedule, axis)
        results.append(
            {
                "grads": {name: placements[name].whole(g, tensor, "test") for name, g in grads.items()},
                "loss": sum(losses.values()) if losses else None,
                "actions": ran.actions,
                "peak": ran.peak,
                "counts": counts,
                "closed": by_purpose(
                    pipeline_traffic(
                        cfg, schedule.owners, axis.coord, [p.input_ids.shape[0] for p in packs(count)], 8, split
                    )
                ),
            }
        )
    return results


def piped_recorded(cases: list[tuple]) -> list[dict]:
    "The cases, each on its own layout of the same ranks"
    meshes: dict[Layout, Mesh] = {}
    for layout, *_ in cases:
        if layout not in meshes:
            meshes[layout] = make_mesh(layout, recorder=Recorder())
    return [piped(meshes[layout], [tuple(case)])[0] for layout, *case in cases]


def compare(world: int, cases: list[tuple]) -> None:
    ranks = run_ranks(piped_recorded, world, cases, timeout=120)
    for i, (layout, cfg, arguments, policy) in enumerate(cases):
        schedule = arguments if isinstance(arguments, Schedule) else make_schedule(*arguments)
        what = f"{schedule.name}, {schedule.micro_num} micro-batches, {policy}, {layout}"
        loss, want = alone(cfg, schedule.micro_num)
        seen: dict[str, Tensor] = {}
        peaks = timeline(schedule).peaks
        for rank, results in enumerate(ranks):
            got, at = results[i], layout.coords(rank).pipeline
            assert got["actions"] == list(schedule.orders[at]), what
            assert got["peak"] == peaks[at], what
            assert got["counts"] == got["closed"], what
            if got["loss"] is not None:
                assert at == schedule.rank_of(schedule.stages - 1)
                torch.testing.assert_close(got["loss"], loss, rtol=1e-12, atol=0)
            for name, g in got["grads"].items():
                # sums of some hundred terms in another order
                torch.testing.assert_close(
                    g,
                    want[name],
                    rtol=0,
                    atol=1e-12 * want[name].abs().max().item(),
                    msg=lambda m, n=name: f"{what}, {n}: {m}",  # noqa: B023
                )
                assert name not in seen or layout.tensor > 1 or torch.equal(g, seen[name]), (
                    what
                )  # the copies of a tied weight, to the bit
                seen[name] = g
        assert set(seen) == set(want), what


TWO = [
    (PLAIN, ("1f1b", 2, 5), "none"),
    (TIED, ("1f1b", 2, 1), "full"),
    (TIED, ("interleaved", 2, 4, 2), "none"),
    (BIASES, ("interleaved", 2, 6, 3), "selective"),
    (BIASES, ("zbh1", 2, 5), "none"),
    (TIED, ("zbh1", 2, 3), "full"),
    (TIED, ("zbv", 2, 4, 2), "none"),
    (BIASES, ("zbv", 2, 5, 2), "selective"),
    (PLAIN, ("zbv", 2, 7, 2), "full"),
]


def test_two_stages_are_one_process():
    compare(2, [(Layout(2, pipeline=2), *case) for case in TWO])


def test_three_stages_are_one_process():
    "Layers that do not divide evenly; fewer micro-batches than ranks"
    cases = [
        (PLAIN, ("1f1b", 3, 2), "none"),
        (TIED, ("zbh1", 3, 4), "none"),
        (TIED, ("interleaved", 3, 6, 2), "full"),
        (TIED, ("zbv", 3, 6, 2), "none"),
    ]
    compare(3, [(Layout(3, pipeline=3), *case) for case in cases])


MODES = {
    "mtp": [(TIED, ("zbh1", 2, 3), "full"), (BIASES, ("interleaved", 2, 4, 2), "none")],
    "msp": [(TIED, ("zbv", 2, 4, 2), "full"), (BIASES, ("zbh1", 2, 3), "none")],
    "fsp": [(BIASES, ("zbv", 2, 4, 2), "none"), (TIED, ("zbh1", 2, 3), "selective")],
}


def test_with_the_tensor_axis():
    "Each rank has some heads and channels of some layers; in msp and fsp a message is a part of the tokens"
    compare(4, [(Layout(4, tensor=2, pipeline=2, mode=mode), *case) for mode, cases in MODES.items() for case in cases])


@pytest.mark.parametrize("layers, stages", [(7, 3), (8, 4), (5, 5), (31, 8), (1, 1)])
def test_layers_are_cut_evenly_and_the_last_stages_take_the_rest(layers, stages):
    ranges = split_layers(layers, stages)
    sizes = [len(r) for r in ranges]
    assert [layer for r in ranges for layer in r] == list(range(layers))
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes)


def test_one_rank_is_the_model_itself():
    "With one rank and one chunk nothing changes, to the bit; with more chunks there is nothing to send"
    loss, want = alone(TIED, 4)
    for arguments, exact in (
        (("1f1b", 1, 4), True),
        (("interleaved", 1, 4, 3), False),
        (("zbv", 1, 4, 2), False),
        (("zbh1", 1, 4), False),
    ):
        (got,) = piped(single(), [(TIED, arguments, "none")])
        assert got["closed"] == {}
        assert list(got["grads"]) == list(want)
        for name, g in got["grads"].items():
            assert (
                torch.equal(g, want[name])
                if exact
                else torch.allclose(g, want[name], rtol=0, atol=1e-12 * want[name].abs().max().item())
            ), name
        assert torch.equal(got["loss"], loss) if exact else torch.allclose(got["loss"], loss, rtol=1e-12)


def evaluate(mesh: Mesh, arguments: tuple) -> dict[int, Tensor]:
    schedule, losses = make_schedule(*arguments), {}
    part, _ = make_part(mesh, TIED, schedule)
    run_schedule(
        part,
        check_schedule(evaluation_schedule(schedule, arguments[2])),
        packs(arguments[2]),
        mesh.axis("pipeline"),
        lambda i, out: out.loss_sum,
        lambda i, out: losses.update({i: out.loss_sum}),
    )
    assert all(p.grad is None for p in part.parameters())
    mesh.check_waited()
    return losses


def many(mesh: Mesh, arguments: tuple) -> int:
    "Most unfinished sends of an evaluation of fifty packs"
    schedule = make_schedule(*arguments)
    part, _ = make_part(mesh, TIED, schedule)
    plan = check_schedule(evaluation_schedule(schedule, 50))
    return run_schedule(part, plan, packs(3) * 16 + packs(2), mesh.axis("pipeline"), lambda i, out: out.loss_sum).unsent


def each(mesh: Mesh, fn, cases: tuple) -> list:
    return [fn(mesh, arguments) for arguments in cases]


def test_evaluation_runs_forward_alone():
    for got in zip(*run_ranks(each, Layout(2, pipeline=2), evaluate, (("interleaved", 2, 4, 2), ("zbv", 2, 4, 2)))):
        losses = {k: v for one in got for k, v in one.items()}
        assert sorted(losses) == [0, 1, 2, 3]
        torch.testing.assert_close(sum(losses.values()), alone(TIED, 4)[0], rtol=1e-12, atol=0)


def test_an_evaluation_keeps_few_sends():
    "The first rank receives nothing, and yet waits for its oldest sends"
    for got in run_ranks(
        each,
        Layout(2, pipeline=2),
        many,
        (("1f1b", 2, 4, 1), ("zbh1", 2, 4, 1), ("interleaved", 2, 4, 2), ("zbv", 2, 4, 2)),
    ):
        assert max(got) <= 4, got


def summed(mesh: Mesh, arguments: tuple) -> tuple[dict[str, Tensor], list[bool]]:
    "Two replicas of a pipeline, with gradients that leave by themselves"
    schedule, data = make_schedule(*arguments), mesh.axis("replica")
    queue = WeightQueue() if schedule.split else None
    part, _ = make_part(mesh, TIED, schedule, queue=queue)
    sums = (
        [ExtraSum(frozenset({"embedding.weight"}), mesh.axis("pipeline"), "tied gradients", coords)]
        if (coords := tied_ranks(TIED, schedule))
        else []
    )
    engine = HybridZero(units_of(part), mesh, master=torch.float64, bucket_bytes=1 << 14, extra_sums=sums)
    engine.start(expected_gradients(part, schedule.micro_num))
    mine = packs(2 * schedule.micro_num)[data.coord :: 2]
    run_schedule(
        part, check_schedule(schedule), mine, mesh.axis("pipeline"), lambda i, out: out.loss_sum / 100, queue=queue
    )
    left = [s.rounds.left for s in engine.sums.values()]
    grads = dict(zip((shard.name for shard in engine.shards), engine.finish()))
    mesh.check_waited()
    return {n: g.view(engine.params[n].shape).clone() for n, g in grads.items()}, left


def test_gradients_leave_when_the_last_of_a_unit_has_come():
    cases = ("zbv", 2, 4, 2), ("interleaved", 2, 2, 2)
    for arguments, *got in zip(cases, *run_ranks(each, Layout(4, pipeline=2), summed, cases)):
        want = alone(TIED, 2 * arguments[2])[1]
        for grads, left in got:
            assert len(left) > 2 and all(left)  # before finish was called
            for name, g in grads.items():
                torch.testing.assert_close(
                    g, want[name], rtol=0, atol=1e-12 * want[name].abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
                )
        assert torch.equal(got[0][0]["embedding.weight"], got[1][0]["embedding.weight"])
        if arguments[0] == "interleaved":
            assert torch.equal(
                got[0][0]["embedding.weight"], got[2][0]["embedding.weight"]
            )  # the copy on the last rank


def steps(mesh: Mesh, arguments: tuple) -> dict[str, Tensor]:
    "Three steps of AdamW with one global norm, a copy of a tied weight not counted twice"
    schedule, axis = make_schedule(*arguments), mesh.axis("pipeline")
    queue = WeightQueue() if schedule.split else None
    part, _ = make_part(mesh, TIED, schedule, queue=queue)
    optimizer, plan = torch.optim.AdamW(part.parameters(), lr=3e-4, weight_decay=0.1), check_schedule(schedule)
    for _ in range(3):
        optimizer.zero_grad()
        run_schedule(part, plan, packs(schedule.micro_num), axis, lambda i, out: out.loss_sum / 100, queue=queue)
        grads = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
        sum_tied(grads, TIED, schedule, axis)
        counted = [
            g.square().sum() for name, g in grads.items() if not (part.holds_copy and name == "embedding.weight")
        ]
        norm = all_reduce(torch.stack(counted).sum(), axis, "norm").sqrt()
        for g in grads.values():
            g.div_(norm)
        optimizer.step()
    return {name: p.detach() for name, p in part.named_parameters()}


def test_three_steps_are_those_of_one_process():
    "Weights of law 2; and the copies of a tied weight stay equal to the bit, though nobody compares them"
    model = Transformer(TIED, dtype=torch.float64)
    fill(model, placements_of(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for b in packs(4):
            out = model(b.input_ids, b.segments, b.indexes, labels=b.labels)
            assert isinstance(out, LossOutput)
            (out.loss_sum / 100).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        for p in model.parameters():
            p.grad = None if p.grad is None else p.grad / norm
        optimizer.step()
    want = dict(model.named_parameters())
    cases = ("1f1b", 2, 4), ("interleaved", 2, 4, 2), ("zbh1", 2, 4), ("zbv", 2, 4, 2)
    for arguments, *got in zip(cases, *run_ranks(each, Layout(2, pipeline=2), steps, cases)):
        for weights in got:
            for name, w in weights.items():  # Adam divides rounding noise by small gradients
                torch.testing.assert_close(
                    w,
                    want[name],
                    rtol=0,
                    atol=1e-10 * want[name].abs().max().item(),
                    msg=lambda m, n=name: f"{arguments}, {n}: {m}",  # noqa: B023
                )
        if arguments[0] != "zbv":
            assert torch.equal(*(weights["embedding.weight"] for weights in got))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", (2, 3, 4))
def test_any_order_that_the_check_lets_pass(ranks):
    "Orders nobody would write, but that are right: actions moved about at random"
    rng, cases = random.Random(ranks), []
    for arguments in (
        ("1f1b", ranks, 4),
        ("interleaved", ranks, 2 * ranks, 2),
        ("zbh1", ranks, 4),
        ("zbv", ranks, 2 * ranks, 2),
    ):
        schedule, moved = make_schedule(*arguments), 0
        while moved < 25:
            orders = [list(order) for order in schedule.orders]
            order = rng.choice(orders)
            order.insert(rng.randrange(len(order)), order.pop(rng.randrange(len(order))))
            other = replace(schedule, orders=tuple(map(tuple, orders)))
            try:
                check_schedule(other)
            except ScheduleError:
                continue
            schedule, moved = other, moved + 1
        cases.append(
            (
                Layout(ranks, pipeline=ranks),
                config(num_layers=9, tie_embeddings=True),
                schedule,
                rng.choice(("none", "full", "selective")),
            )
        )
    compare(ranks, cases)


@pytest.mark.slow
def test_eight_ranks():
    wide = config(num_layers=18, tie_embeddings=True)
    flat = Layout(8, pipeline=8)
    both = Layout(8, tensor=2, pipeline=4, mode="msp")
    compare(
        8,
        [
            (flat, wide, ("1f1b", 8, 10), "none"),
            (flat, wide, ("interleaved", 8, 16, 2), "none"),
            (flat, wide, ("zbh1", 8, 9), "none"),
            (flat, wide, ("zbv", 8, 16, 2), "none"),
            (both, wide, ("zbv", 4, 9, 2), "full"),
            (both, wide, ("interleaved", 4, 8, 4), "none"),
        ],
    )


class WithExtra(nn.Module):
    "A part whose stages add something to the loss"

    def __init__(self, part):
        super().__init__()
        self.part, self.cfg, self.stages = part, part.cfg, part.stages

    def forward(self, batch, x=None, chunk=0):
        out, _ = self.part(batch, x, chunk)
        w = self.part.blocks[self.part.ranges[self.stages[chunk]][0]].feed_forward.w1.weight
        seen = out.square().sum() if isinstance(out, Tensor) else out.loss_sum
        return out, seen * 1e-3 + w.square().sum()


def extra(mesh: Mesh, arguments: tuple) -> tuple[dict[str, Tensor], Tensor]:
    schedule, total = make_schedule(*arguments), []
    queue = WeightQueue() if schedule.split else None
    part, _ = make_part(mesh, PLAIN, schedule, queue=queue)

    def scale_extra(i, value):
        total.append(value.detach())
        return value * 0.5

    run_schedule(
        WithExtra(part),
        check_schedule(schedule),
        packs(arguments[2]),
        mesh.axis("pipeline"),
        lambda i, out: out.loss_sum,
        scale_extra=scale_extra,
        queue=queue,
    )  # type: ignore[arg-type]
    return {n: p.grad for n, p in part.named_parameters()}, sum(total)


def test_what_stages_add_to_the_loss():
    "An auxiliary loss begins its backward in its own stage"
    cases = ("1f1b", 2, 3), ("zbv", 2, 4, 2)
    for arguments, *got in zip(cases, *run_ranks(each, Layout(2, pipeline=2), extra, cases)):
        schedule = make_schedule(*arguments)
        model = Transformer(PLAIN, dtype=torch.float64)
        fill(model, placements_of(model))
        added = []
        for b in packs(arguments[2]):
            stop = [r[-1] for r in split_layers(7, schedule.stages)]
            start = [r[0] for r in split_layers(7, schedule.stages)]
            outs = []
            hooks = [
                model.blocks[i].register_forward_hook(lambda m, a, out, outs=outs: outs.append(out)) for i in stop[:-1]
            ]
            out = model(b.input_ids, b.segments, b.indexes, labels=b.labels)
            for h in hooks:
                h.remove()
            assert isinstance(out, LossOutput)
            aux = (
                sum(o.square().sum() for o in outs) * 1e-3
                + out.loss_sum * 1e-3
                + sum(model.blocks[i].feed_forward.w1.weight.square().sum() for i in start)
            )  # type: ignore[union-attr,operator]
            (out.loss_sum + 0.5 * aux).backward()
            added.append(aux.detach())
        torch.testing.assert_close(sum(t for _, t in got), sum(added), rtol=1e-12, atol=0)
        for name, p in model.named_parameters():
            g = next(grads[name] for grads, _ in got if name in grads)
            torch.testing.assert_close(g, p.grad, rtol=0, atol=1e-12 * p.grad.abs().max().item())


def freed(mesh: Mesh, arguments: tuple) -> list[tuple[str, int]]:
    "After each action: which outputs, inputs and saved tensors of this rank's blocks are still alive"
    schedule = make_schedule(*arguments)
    queue = WeightQueue() if schedule.split else None
    part, _ = make_part(mesh, PLAIN, schedule, queue=queue)
    alive: list[weakref.ref] = []  # one tensor of each pass through a block that its backward needs: the gate's input
    outputs: list[weakref.ref] = []  # results of stages
    first = [part.ranges[s][0] for s in part.stages]
    for layer in first:
        part.blocks[layer].feed_forward.register_forward_hook(lambda m, args, out: alive.append(weakref.ref(args[0])))
    part.register_forward_hook(
        lambda m, args, out: (
            outputs.append(weakref.ref(out[0].untyped_storage())) if isinstance(out[0], Tensor) else None
        )
    )
    seen = []
    inner = part.forward

    def watched(*args, **kwargs):
        out = inner(*args, **kwargs)
        seen.append((sum(a() is not None for a in alive), sum(o() is not None for o in outputs)))
        return out

    part.forward = watched  # type: ignore[method-assign]
    ran = run_schedule(
        part,
        check_schedule(schedule),
        packs(schedule.micro_num),
        mesh.axis("pipeline"),
        lambda i, out: out.loss_sum,
        queue=queue,
    )
    assert not any(a() for a in alive) and not any(o() for o in outputs)
    assert max(a for a, _ in seen) <= ran.peak, (seen, ran.peak)
    return seen


def test_memory_is_free_when_the_count_says_so():
    "What backward needs of a micro-batch is alive for no more micro-batches than the simulated peak; results of stages vanish once they are sent"
    for results in run_ranks(each, Layout(2, pipeline=2), freed, (("1f1b", 2, 6), ("zbh1", 2, 6), ("zbv", 2, 6, 2))):
        for seen in results:
            assert max(o for _, o in seen) <= 3, seen  # of six: those under way, and on the first rank its warm-up's


def theirs(mesh: Mesh, name: str, chunks: int, count: int) -> dict[str, Tensor]:
    "Gradients of a chain of linear maps by torch.distributed.pipelining"
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining import schedules as theirs

    axis, schedule = mesh.axis("pipeline"), make_schedule(name, mesh.axis("pipeline").size, count, chunks)
    mine = {s: chain(s) for s in schedule.stages_of(axis.coord)}
    stages = [PipelineStage(mine[s], s, schedule.stages, torch.device("cpu"), group=axis.group) for s in mine]
    loss = lambda out, target: (out - target).square().sum()  # noqa: E731
    cls = {
        "1f1b": theirs.Schedule1F1B,
        "zbh1": theirs.ScheduleInterleavedZeroBubble,
        "zbv": theirs.ScheduleZBVZeroBubble,
        "interleaved": theirs.ScheduleInterleaved1F1B,
    }[name]
    run = cls(stages[0] if name == "1f1b" else stages, count, loss_fn=loss, scale_grads=False)
    x, target = toy(count)
    run.step(*([x] if 0 in mine else []), **({"target": target} if schedule.stages - 1 in mine else {}))
    return {f"{s}.{n}": p.grad for s in mine for n, p in mine[s].named_parameters()}


def chain(stage: int) -> nn.Module:
    torch.manual_seed(stage)
    return nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), nn.Tanh())


def toy(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, target = (torch.randn(4 * count, 6, generator=g, dtype=torch.float64) for _ in range(2))
    return x, target


class Toy(nn.Module):
    "The same chain as a part"

    def __init__(self, stages: tuple[int, ...], count: int):
        super().__init__()
        self.stages, self.count = stages, count
        self.cfg = replace(PLAIN, hidden_size=6, num_heads=1, num_kv_heads=1)
        self.blocks = nn.ModuleDict({str(s): chain(s) for s in stages})

    def forward(self, batch, x=None, chunk=0):
        out = self.blocks[str(self.stages[chunk])](batch.x if x is None else x)
        return (
            LossOutput((out - batch.target).square().sum(), out, out) if batch.last == self.stages[chunk] else out
        ), None


def ours(mesh: Mesh, name: str, chunks: int, count: int) -> dict[str, Tensor]:
    from types import SimpleNamespace

    axis, schedule = mesh.axis("pipeline"), make_schedule(name, mesh.axis("pipeline").size, count, chunks)
    part, queue, (x, target) = Toy(schedule.stages_of(axis.coord), count), WeightQueue(), toy(count)
    batches = [
        SimpleNamespace(x=a, target=b, input_ids=a, last=schedule.stages - 1)
        for a, b in zip(x.chunk(count), target.chunk(count))
    ]
    if schedule.split:
        defer_weights(part, queue)
    run_schedule(part, check_schedule(schedule), batches, axis, lambda i, out: out.loss_sum, queue=queue)  # type: ignore[arg-type]
    return {n.removeprefix("blocks."): p.grad for n, p in part.named_parameters()}


def both(mesh: Mesh) -> None:
    for name, chunks, count in (("1f1b", 1, 4), ("interleaved", 2, 4), ("zbh1", 1, 5), ("zbv", 2, 6)):
        if name == "zbh1":  # theirs wants several stages on each rank
            continue
        mine, others = ours(mesh, name, chunks, count), theirs(mesh, name, chunks, count)
        assert set(mine) == set(others)
        for n in mine:
            torch.testing.assert_close(mine[n], others[n], rtol=0, atol=1e-12)


def refused(mesh: Mesh) -> None:
    schedule, axis = make_schedule("zbh1", 2, 4), mesh.axis("pipeline")
    part, _ = make_part(mesh, PLAIN, schedule)
    plan, loss = check_schedule(schedule), lambda i, out: out.loss_sum
    for words, run in (
        ("call defer_weights", lambda: run_schedule(part, plan, packs(4), axis, loss)),
        (
            "for 4 micro-batches, but there are 3",
            lambda: run_schedule(part, plan, packs(3), axis, loss, queue=WeightQueue()),
        ),
        (
            "for 3 ranks, but the pipeline axis has 2",
            lambda: run_schedule(part, check_schedule(make_schedule("1f1b", 3, 4)), packs(4), axis, loss),
        ),
        (
            "cut the model by this schedule",
            lambda: run_schedule(part, check_schedule(make_schedule("interleaved", 2, 4, 2)), packs(4), axis, loss),
        ),
    ):
        with pytest.raises(ValueError, match=words):
            run()


def late(mesh: Mesh) -> float:
    "A message that comes after the first slice of its wait"
    if mesh.rank == 0:
        time.sleep(1.2)
    other = 1 - mesh.rank
    return (
        start_send_receive(
            [(torch.full((3,), float(mesh.rank)), other)], [(torch.empty(3), other)], mesh.axis("pipeline"), "test"
        )
        .wait()[0][0]
        .item()
    )


def some(mesh: Mesh) -> float:
    both(mesh)
    refused(mesh)
    return late(mesh)


def test_second_opinion_refusals_and_late_messages():
    assert run_ranks(some, Layout(2, pipeline=2), timeout=90) == [1.0, 0.0]


def test_a_step_under_fake_tensors():
    "The lab's tracer runs a stage of any world in one process: nothing in it waits for the device"
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder, cfg = Recorder(), config(num_layers=8)
    init_distributed("fake", place=Place(2, 4, 0))
    try:
        axis = make_mesh(Layout(4, pipeline=4), recorder=recorder).axis("pipeline")
        for arguments in (("1f1b", 4, 8), ("zbv", 4, 8, 2)):
            schedule, queue = make_schedule(*arguments), WeightQueue()
            part = pipeline_cut(Transformer(cfg, device="meta", dtype=torch.bfloat16), schedule, axis.coord)
            defer_weights(part, queue)
            recorder.reset()
            with FakeTensorMode():
                for module in part.modules():
                    for name, p in list(module.named_parameters(recurse=False)):
                        setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype)))
                ids = torch.zeros(16, dtype=torch.int64)
                batch = Pack(ids, ids, ids, Segments(torch.zeros(3, dtype=torch.int32), (8, 8), 8))
                run_schedule(
                    part, check_schedule(schedule), [batch] * 8, axis, lambda i, out: out.loss_sum, queue=queue
                )
            assert all(p.grad is not None for p in part.parameters())
            assert {key[1]: c for key, c in recorder.counts.items()} == by_purpose(
                pipeline_traffic(cfg, schedule.owners, axis.coord, [16] * 8, forward_only=schedule.forward_only)
            )
    finally:
        destroy()


def lost(mesh: Mesh) -> None:
    if mesh.rank == 1:
        raise OSError("out of paper")
    piped(mesh, TWO[:1])


def test_a_stage_that_fails_is_named():
    with pytest.raises(RankError, match=r"(?s)rank 1 failed first.*out of paper"):
        run_ranks(lost, Layout(2, pipeline=2), timeout=20)

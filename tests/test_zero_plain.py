"Plain data parallelism, (1, 1, 1): the sums of one process, behind backward, in the bytes of the closed form and few exchanges; PyTorch's DDP as a second opinion; any module"

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from internlm_nb.data.packing import pack
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.init import init_weights
from internlm_nb.model.transformer import Transformer
from internlm_nb.parallel.batch import Batch
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.mesh import make_mesh, single
from internlm_nb.parallel.ranks import RankError, run_ranks
from internlm_nb.parallel.record import Recorder, sent_bytes
from internlm_nb.train.config import ZeroConfig
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.parallelize import make_optimizer
from internlm_nb.train.precision import PRECISIONS
from internlm_nb.train.step import train_step
from internlm_nb.zero.flat import join
from internlm_nb.zero.hybrid import HybridZero, held_bytes
from internlm_nb.zero.sharding import Sharding, shardings
from internlm_nb.zero.unit import ZeroError
from internlm_nb.zero.units import UnitSpec

CFG = ModelConfig(
    family="internlm2",
    vocab_size=97,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    mlp_ratio=2.0,
    multiple_of=16,
)


def batches(count: int, seed: int = 0) -> list[Batch]:
    "Packs of documents of mixed lengths"
    g = torch.Generator().manual_seed(seed)
    docs = [
        torch.randint(0, 97, (int(n),), generator=g).tolist() for n in torch.randint(2, 16, (8 * count,), generator=g)
    ]
    packs = list(pack(docs, seq_len=16, micro_bsz=2))
    assert len(packs) >= count
    return [Batch.of(p) for p in packs[:count]]


def model_of(dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(CFG, dtype=dtype)
    init_weights(model, 0)
    return model


def step(mesh, precision: str, count: int, bucket_bytes: int):
    "One step's gradients, norm and weights, and what the recorder saw"
    model = model_of(PRECISIONS[precision].param)
    opt = make_optimizer(
        model, OptimConfig(lr=1e-3, clip=0.1), PRECISIONS[precision], mesh, bucket_mb=bucket_bytes / 2**20
    )
    opt.set_schedule(50, 100)
    data = mesh.axis("data")
    mine = batches(count)[data.coord :: data.size]
    seen: list[tuple[str, int]] = []  # gradients that arrived, and how many collectives had been launched before
    if mesh.recorder is not None:
        for n, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, n=n: seen.append((n, len(mesh.recorder.events))))
    out = train_step(model, opt, mine, sum(b.num_targets for b in mine), mesh=mesh)
    mesh.check_waited()
    names = [shard.name for shard in opt.engine.shards]
    return {
        "loss": out.loss,
        "norm": out.grad_norm,
        "grads": dict(zip(names, (g.clone() for g in opt.collect()))),
        "weights": {shard.name: shard.master.clone() for shard in opt.engine.shards},
        "seen": seen,
        "recorder": mesh.recorder,
        "units": [sum(p.numel() for p in unit.params.values()) for unit in opt.engine.units],
        "padded": sum(unit.layout.size for unit in opt.engine.units),
    }


def on_ranks(world: int, *args):
    "The step on several ranks with a recorder each"
    return run_ranks(_recorded, world, world, *args)


def _recorded(world: int, *args):
    return step(make_mesh(Layout(world), recorder=Recorder(events=True)), *args)


@pytest.mark.parametrize(
    "precision,tolerance", [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 3e-2)]
)  # bf16: gradients of equal packs are rounded alike, but the attention of one process is not
def test_ranks_are_one_process(precision, tolerance):
    alone = step(single(), precision, 6, 1 << 20)
    ranks = on_ranks(3, precision, 6, 4096)
    for got in ranks:
        assert torch.allclose(got["loss"], alone["loss"], rtol=tolerance, atol=0)
        assert torch.allclose(got["norm"], alone["norm"], rtol=tolerance, atol=0)
        for n, g in alone["grads"].items():
            assert got["grads"][n].dtype == PRECISIONS[precision].master
            assert (got["grads"][n] - g).abs().max() <= tolerance * g.abs().max(), n
            assert torch.equal(got["weights"][n], ranks[0]["weights"][n]), (
                n
            )  # ranks stay equal to the bit, or they would drift apart


def test_bytes_order_and_overlap():
    "All gradients once a step, in the closed form's bytes; the first exchange leaves before the last gradient is there; one order on all ranks; none in earlier micro-batches"
    got = on_ranks(2, "float32", 6, 4096)
    for out in got:
        count = out["recorder"].total("copies", "summed gradients", "all_reduce")
        assert count.calls == len(out["units"]) > 3
        assert count.payload_bytes == 4 * out["padded"] and count.sent_bytes == sent_bytes(
            "all_reduce", 4 * out["padded"], 2
        )
        events = [e for e in out["recorder"].events if e.call.purpose == "summed gradients"]
        launches = [e.call.payload_bytes for e in events if e.kind == "launch"]
        assert launches == [
            e.call.payload_bytes
            for e in got[0]["recorder"].events
            if e.kind == "launch" and e.call.purpose == "summed gradients"
        ]
        names = len(list(model_of().parameters()))
        before = [at for _, at in out["seen"]]
        first = next(i for i, e in enumerate(out["recorder"].events) if e.call.purpose == "summed gradients")
        assert all(
            at <= first for at in before[: 2 * names]
        )  # three micro-batches: nothing is sent during the first two
        assert before[-1] > first


# ---- few exchanges


def buckets(sizes: list[int], limit: int) -> int:
    "How many buckets parameters fill, each put whole into the open one while it fits"
    count, filled = 0, limit
    for size in reversed(sizes):
        if filled + size > limit:
            count, filled = count + 1, 0
        filled += size
    return count


@pytest.mark.parametrize("seed", range(200))
def test_joins_are_never_more_than_buckets(seed):
    "However parameters lie in units: each join but the last holds `limit` elements or more, so there are not more joins than buckets filled parameter by parameter"
    pick = random.Random(seed)
    units = [
        [pick.choice([1, 7, 50, 400, 3000]) for _ in range(pick.randint(1, 6))] for _ in range(pick.randint(1, 20))
    ]
    limit = pick.choice([1, 10, 100, 1000, 10_000])
    groups = join([sum(u) for u in units], limit)
    assert [i for group in groups for i in group] == list(range(len(units)))
    assert all(sum(sum(units[i]) for i in group) >= limit for group in groups[1:])  # the first is the last in backward
    assert len(groups) <= buckets([p for unit in units for p in unit], limit)


def test_one_exchange_for_a_small_model():
    assert (
        len(step(single(), "float32", 2, 1 << 20)["units"]) == CFG.num_layers + 2
    )  # alone there is nothing to join for
    for out in on_ranks(2, "float32", 2, 1 << 20):
        assert out["recorder"].total("copies", "summed gradients", "all_reduce").calls == 1


# ---- one process


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_alone_nothing_is_kept_twice(precision):
    "In float32 the master is the weight, and gradients are the tensors that backward made; in bf16 there is one master, and no flat gradient"
    model = model_of(PRECISIONS[precision].param)
    opt = make_optimizer(model, OptimConfig(), PRECISIONS[precision])
    elements = sum(p.numel() for p in model.parameters())
    held = held_bytes(opt.engine)
    assert held["gathered"] == held["gradients"] == held["buffers"] == 0
    assert (held["masters"] == 0) == (precision == "float32")
    made: list[int] = []
    model.head.weight.register_hook(lambda g: made.append(g.data_ptr()))
    one = batches(1)
    opt.zero_grad()
    (model(one[0].input_ids, one[0].segments, labels=one[0].labels).loss_sum / one[0].num_targets).backward()
    grad = dict(zip((shard.name for shard in opt.engine.shards), opt.collect()))["head.weight"]
    assert (grad.data_ptr() == made[0]) == (precision == "float32")
    assert held_bytes(opt.engine)["gradients"] == 4 * elements
    opt.update()
    opt.zero_grad()
    assert held_bytes(opt.engine)["gradients"] == 0  # before the next forward pass
    assert all(p.grad is None for p in model.parameters())


def test_the_norm_is_pytorchs():
    "Squares are added in float64: to 1e-7, the last digit of float32"
    got = step(single(), "float32", 3, 1 << 20)
    coef = (0.1 / (got["norm"] + 1e-6)).clamp(max=1.0)  # ours are clipped by now
    want = torch.nn.utils.get_total_norm([g.double() / coef for g in got["grads"].values()])
    assert abs(got["norm"].double() / want - 1) < 5e-7


# ---- second opinion


def _ddp(mesh):
    "The same sums by PyTorch's DDP: it averages, so the loss is multiplied by the number of ranks"
    from torch.nn.parallel import DistributedDataParallel

    world = mesh.layout.world
    mine = batches(4)[mesh.rank :: world]
    targets = sum(b.num_targets for b in batches(4))
    theirs = model_of(torch.float64)
    ddp = DistributedDataParallel(theirs)
    for i, b in enumerate(mine):
        with ddp.no_sync() if i < len(mine) - 1 else torch.enable_grad():
            (ddp(b.input_ids, b.segments, b.indexes, labels=b.labels).loss_sum * world / targets).backward()
    return {n: p.grad for n, p in theirs.named_parameters()}


def test_second_opinion_ddp():
    theirs = run_ranks(_ddp, Layout(2))
    ours = on_ranks(2, "float64", 4, 4096)
    norm = ours[0]["norm"]
    assert torch.allclose(torch.nn.utils.get_total_norm(list(theirs[0].values())), norm, rtol=1e-12, atol=0)
    coef = (0.1 / (norm + 1e-6)).clamp(max=1.0)  # ours are clipped by now
    for n, g in theirs[0].items():
        assert (ours[0]["grads"][n] / coef - g.flatten()).abs().max() <= 1e-12 * g.abs().max(), n


# ---- what goes wrong


def _poisoned(mesh):
    "One rank's gradient is infinite"
    model = model_of()
    opt = make_optimizer(model, OptimConfig(lr=1e-3), mesh=mesh)
    opt.set_schedule(50, 100)
    weight = dict(model.named_parameters())["head.weight"]
    before = weight.detach().clone()
    mine = batches(2)[mesh.rank :: 2]
    if mesh.rank == 1:
        weight.register_hook(lambda g: g * float("inf"))
    out = train_step(model, opt, mine, sum(b.num_targets for b in mine), mesh=mesh)
    return out.skipped.item(), torch.equal(before, weight.detach())


def test_one_bad_gradient_skips_the_step_everywhere():
    assert run_ranks(_poisoned, Layout(2)) == [(1.0, True)] * 2


def _lost(mesh):
    if mesh.rank == 1:
        raise OSError("out of paper")
    model = model_of()
    opt = make_optimizer(model, OptimConfig(), mesh=mesh)
    train_step(model, opt, batches(1), 1, mesh=mesh)


def test_a_rank_that_fails_is_named():
    with pytest.raises(RankError, match=r"(?s)rank 1 failed first.*out of paper"):
        run_ranks(_lost, Layout(2), timeout=20)


def test_a_step_begins_with_zero_grad():
    model = model_of()
    opt = make_optimizer(model, OptimConfig())
    for _ in range(2):
        out = model(batches(1)[0].input_ids, labels=batches(1)[0].labels)
        if opt.grads is None:
            out.loss_sum.backward()
            opt.update()
    with pytest.raises(
        RuntimeError, match=r"does each step begin with zero_grad|got more gradients than start was told to expect"
    ):
        out.loss_sum.backward()


# ---- a model that nobody knows


class Two(nn.Module):
    "Two results in a dict, of which the loss may use either"

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.a(x).tanh()
        return {"hidden": h, "out": self.b(h)}


def toy(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (Two() if kind == "dict" else nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))).double()


def train_toy(mesh, kind: str, zero: ZeroConfig):
    "Three steps of two micro-batches: the weights"
    model = toy(kind)
    opt = make_optimizer(model, OptimConfig(lr=1e-2, clip=0.1), PRECISIONS["float64"], mesh, zero)
    x = torch.randn(3, 8, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i in range(3):
        opt.zero_grad()
        opt.set_schedule(i, 3)
        for part in x[i].chunk(2 * mesh.layout.world)[mesh.rank :: mesh.layout.world]:
            out = model(part)
            ((out["hidden"].square().sum() + out["out"].sum()) if kind == "dict" else out.square().sum()).backward()
        opt.update()
    with opt.engine.gathered():
        first = model(x[0])  # on every rank as often as it likes: nothing is exchanged
        again = model(x[0])
        assert torch.equal(*(y["out"] if kind == "dict" else y for y in (first, again)))
        return {n: p.detach().clone() for n, p in model.named_parameters()}


def toys(mesh):
    cases = [
        (kind, ZeroConfig(*s.factors, reshard=reshard, check=True))
        for kind in ("sequential", "dict")
        for s in shardings(2)
        for reshard in ("forward", "step")
    ]
    return [(kind, train_toy(mesh, kind, zero)) for kind, zero in cases]


def test_any_module_is_sharded_and_trained():
    "One unit, gathered before its forward and kept until its backward is over"
    want = {kind: train_toy(single(), kind, ZeroConfig()) for kind in ("sequential", "dict")}
    for results in run_ranks(toys, Layout(2)):
        for kind, got in results:
            assert all((got[n] - w).abs().max() <= 1e-12 for n, w in want[kind].items()), kind


def _odd(mesh):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self):
            return object()

    model = Odd()
    HybridZero([UnitSpec("odd", model, dict(model.named_parameters()))], mesh, Sharding(2, 2, 2))
    try:
        model()
    except ZeroError as error:
        return str(error)


def test_what_cannot_be_followed_is_said():
    assert all("unit odd: its module gave object" in said for said in run_ranks(_odd, Layout(2)))
    net = nn.Linear(2, 2)
    params = dict(net.named_parameters())
    with pytest.raises(ValueError, match="unit b: bias, weight given twice"):
        HybridZero([UnitSpec("a", net, params), UnitSpec("b", net, params)], single())
    with pytest.raises(ValueError, match="unit a is also computed with c, which was not given"):
        HybridZero([UnitSpec("a", net, params, also=("c",))], single())
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"1.weight is torch.float64 on cpu, others torch.float32"):
        HybridZero([UnitSpec("mixed", mixed, dict(mixed.named_parameters()))], single())

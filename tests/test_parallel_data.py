"Gradients in buckets: the sum of one process, behind backward, in the bytes of the closed form; PyTorch's DDP as a second opinion"

from __future__ import annotations

import pytest
import torch
from torch import nn

from internlm_nb.data.packing import pack
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.init import init_weights
from internlm_nb.model.transformer import Transformer
from internlm_nb.parallel.data import GradientBuckets, plan_buckets
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.mesh import make_mesh, single
from internlm_nb.parallel.ranks import RankError, run_ranks
from internlm_nb.parallel.record import Recorder, sent_bytes
from internlm_nb.train.optim import OptimConfig, Optimizer
from internlm_nb.train.precision import PRECISIONS
from internlm_nb.train.step import Batch, train_step

CFG = ModelConfig(family="internlm2", vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_ratio=2.0, multiple_of=16)


def batches(count: int, seed: int = 0) -> list[Batch]:
    "Packs of documents of mixed lengths"
    g = torch.Generator().manual_seed(seed)
    docs = [torch.randint(0, 97, (int(n),), generator=g).tolist() for n in torch.randint(2, 16, (8 * count,), generator=g)]
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
    opt = Optimizer(model, OptimConfig(lr=1e-3, clip=0.1), PRECISIONS[precision], None, mesh, None, bucket_bytes)
    opt.set_schedule(50, 100)
    data = mesh.axis("data")
    mine = batches(count)[data.coord :: data.size]
    seen: list[tuple[str, int]] = []  # gradients that arrived, and how many collectives had been launched before
    if mesh.recorder is not None:
        for n, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, n=n: seen.append((n, len(mesh.recorder.events))))
    out = train_step(model, opt, mine, sum(b.num_targets for b in mine), mesh=mesh)
    mesh.check_waited()
    grads = {n: m.grad.clone() for n, m in opt.masters.items() if m.grad is not None}
    return {
        "loss": out.loss,
        "norm": out.grad_norm,
        "grads": grads,
        "weights": {n: m.detach().clone() for n, m in opt.masters.items()},
        "seen": seen,
        "recorder": mesh.recorder,
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
            assert torch.equal(got["weights"][n], ranks[0]["weights"][n]), n  # ranks stay equal to the bit, or they would drift apart


def test_bytes_order_and_overlap():
    "All gradients once a step, in the closed form's bytes; the first bucket leaves before the last gradient is there; one order on all ranks; none in earlier micro-batches"
    got = on_ranks(2, "float32", 6, 4096)
    total = sum(p.numel() for p in model_of().parameters())
    plan = plan_buckets({n: p.numel() for n, p in model_of().named_parameters()}, 1024)
    for out in got:
        count = out["recorder"].total("replica", "gradients", "all_reduce")
        assert count.calls == len(plan) > 3
        assert count.payload_bytes == 4 * total and count.sent_bytes == sent_bytes("all_reduce", 4 * total, 2)
        events = [e for e in out["recorder"].events if e.call.purpose == "gradients"]
        launches = [e.call.payload_bytes for e in events if e.kind == "launch"]
        assert launches == [e.call.payload_bytes for e in got[0]["recorder"].events if e.kind == "launch" and e.call.purpose == "gradients"]
        names = len(list(model_of().parameters()))
        before = [at for _, at in out["seen"]]
        first = next(i for i, e in enumerate(out["recorder"].events) if e.call.purpose == "gradients")
        assert all(at <= first for at in before[: 2 * names])  # three micro-batches: nothing is sent during the first two
        assert before[-1] > first and [e.kind for e in events[:2]] == ["launch", "launch"]


def test_last_must_be_said_and_every_parameter_must_take_part():
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    params = {"a": a.weight, "b": b.weight}
    sums = GradientBuckets(params, torch.float32, single().axis("replica"))
    sums.start()
    (a(torch.ones(1, 2)) + b(torch.ones(1, 2))).sum().backward()
    with pytest.raises(RuntimeError, match=r"call last\(\)"):
        sums.finish()
    sums.start()
    sums.last()
    a(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="'b' got no gradient"):
        sums.finish()


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
        assert (ours[0]["grads"][n] / coef - g).abs().max() <= 1e-12 * g.abs().max(), n


def _poisoned(mesh):
    "One rank's gradient is infinite"
    model = model_of()
    opt = Optimizer(model, OptimConfig(lr=1e-3), PRECISIONS["float32"], None, mesh)
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
    opt = Optimizer(model, OptimConfig(), PRECISIONS["float32"], None, mesh)
    train_step(model, opt, batches(1), 1, mesh=mesh)


def test_a_rank_that_fails_is_named():
    with pytest.raises(RankError, match=r"(?s)rank 1 failed first.*out of paper"):
        run_ranks(_lost, Layout(2), timeout=20)

"Hybrid ZeRO on one GPU: states with the host are the same training, and leave the device"

from __future__ import annotations

import pytest
import torch

from internlm_nb.data.loader import DataConfig, Loader
from internlm_nb.model.config import ModelConfig
from internlm_nb.parallel.batch import Batch
from internlm_nb.parallel.mesh import single
from internlm_nb.train.config import RunConfig, TrainConfig, ZeroConfig
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.parallelize import build
from internlm_nb.train.step import train_step
from internlm_nb.zero.offload import HostAdamW
from internlm_nb.zero.unit import to_host

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def figures(zero: ZeroConfig, device: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = ModelConfig("internlm2", 96, 64, 2, 4, 2, 2.0, multiple_of=16)
    run = RunConfig(
        "x",
        model,
        DataConfig(seq_len=32, micro_num=2, prefetch=0),
        OptimConfig(lr=1e-3),
        TrainConfig(steps=4, precision="bfloat16"),
        zero=zero,
    )
    mesh = single(device)
    made, _, _, opt = build(run, mesh)
    loader, out = Loader(run.data, 1, 96), []
    for step in range(4):
        opt.set_schedule(step, 4)
        batches = [Batch.of(p, device) for p in loader.batch(step, 0, 1)]
        out.append(train_step(made, opt, batches, sum(b.num_targets for b in batches)).loss.item())
    if zero.offload:
        assert all(
            t.device.type == "cpu" for m, s in opt.inner.state.items() for t in (m, s["exp_avg"], s["exp_avg_sq"])
        )
    return out, {n: p.detach().clone() for n, p in made.named_parameters()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
def test_states_with_the_host_are_the_same_training(device):
    "The kernel is the same, and so is all that is around it"
    losses, weights = figures(ZeroConfig(), device)
    losses1, weights1 = figures(ZeroConfig(offload=True), device)
    assert losses[-1] < losses[0] and max(abs(a - b) for a, b in zip(losses, losses1)) < 1e-3
    assert (
        max((weights[n].float() - weights1[n].float()).abs().max().item() for n in weights) < 2e-3
    )  # a rounding of bfloat16 at most


@pytest.mark.gpu
@CUDA
def test_slices_come_and_go_on_streams():
    "Many slices of unequal size, bit for bit as one fused AdamW on the device"
    g = torch.Generator().manual_seed(0)
    masters = [torch.randn(n, generator=g) for n in (10, 100_000, 3, 1_000_000, 50, 2_000_000, 7)]
    there = [m.cuda().requires_grad_() for m in masters]
    hosts = [to_host(m.detach()) for m in there]
    ours = HostAdamW([{"params": hosts, "weight_decay": 0.1}], 1e-2, (0.9, 0.95), 1e-8, torch.device("cuda", 0))
    for m in hosts:
        ours.state[m] = {
            "step": torch.zeros((), device="cuda"),
            "exp_avg": to_host(torch.zeros(m.shape, device="cuda")),
            "exp_avg_sq": to_host(torch.zeros(m.shape, device="cuda")),
        }
    peer = torch.optim.AdamW(there, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for _ in range(5):
        for t in there:
            t.grad = torch.randn(t.shape, generator=g).cuda()
        grads = {m: t.grad.clone() for m, t in zip(hosts, there) if t.grad is not None}
        ours.step(grads, torch.ones((), device="cuda"), torch.zeros((), device="cuda"))
        peer.step()
    torch.cuda.synchronize()
    assert all(m.is_pinned() and torch.equal(m, t.detach().cpu()) for m, t in zip(hosts, there))

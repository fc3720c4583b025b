"Second opinions: PyTorch's FSDP2, HSDP and DDP train step for step what (Z, Z, Z), (n, n, n) and (1, 1, 1) train"

from __future__ import annotations

import torch
import torch.distributed as dist
from test_zero_hybrid import STEPS, run_of, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from internlm_nb.data.loader import Loader
from internlm_nb.parallel.batch import Batch
from internlm_nb.parallel.mesh import Mesh
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.train.config import RunConfig
from internlm_nb.train.optim import param_groups
from internlm_nb.train.parallelize import build_model, layout_of
from internlm_nb.zero.sharding import Sharding


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def peer(mesh: Mesh, run: RunConfig, kind: str):
    "Three steps with PyTorch's own tools: losses, norms, weights"
    model, _ = build_model(run, mesh)
    z, data = mesh.layout.world, mesh.axis("data")
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        device = (
            init_device_mesh("cpu", (z,))
            if kind == "fsdp"
            else init_device_mesh("cpu", (2, z // 2), mesh_dim_names=("copies", "shards"))
        )
        for block in model.blocks:
            fully_shard(block, mesh=device)
        wrapped = fully_shard(model, mesh=device)
    params = dict(model.named_parameters())
    groups = param_groups(list(params), run.optim)
    inner = torch.optim.AdamW(
        [{"params": [params[n] for n in g.names], "lr": g.lr, "weight_decay": g.weight_decay} for g in groups],
        betas=(run.optim.beta1, run.optim.beta2),
        eps=run.optim.eps,
    )
    loader, figures = Loader(run.data, run.train.seed, run.model.vocab_size), []
    for step in range(STEPS):
        batches = [Batch.of(p, mesh=mesh) for p in loader.batch(step, data.coord, data.size)]
        targets = torch.tensor(sum(b.num_targets for b in batches))
        dist.all_reduce(targets)
        total = torch.zeros((), dtype=torch.float64)
        for b in batches:
            loss = wrapped(b.input_ids, b.segments, b.indexes, labels=b.labels).loss_sum / targets  # type: ignore[operator]
            total += loss.detach()
            (loss * z).backward()  # these tools average over ranks
        dist.all_reduce(total)
        grads = [p.grad for p in params.values() if p.grad is not None]
        norm = whole(get_total_norm(grads))  # a DTensor is whole only when asked
        for g in grads:
            g.mul_((run.optim.clip / (norm + 1e-6)).clamp(max=1.0))
        inner.step()
        inner.zero_grad()
        figures.append((total.item(), norm.item()))
    return figures, {n: whole(p.detach()) for n, p in params.items()}


def both(mesh: Mesh, run: RunConfig):
    pairs = (("ddp", Sharding(1, 1, 1)), ("fsdp", Sharding(-1, -1, -1)), ("hsdp", Sharding(2, 2, 2)))
    return [(kind, peer(mesh, run, kind), train(mesh, run, sharding)[:2]) for kind, sharding in pairs]


def test_fsdp2_hsdp_and_ddp_agree():
    "In float64 sums in another order differ by some 1e-16 of the largest; Adam makes that up to 1e-12 of the weights after three steps"
    run = run_of(8)
    for kind, (figures, weights), (figures1, weights1) in (
        r for rank in run_ranks(both, layout_of(run, 4), run, timeout=100) for r in rank
    ):
        for (loss, norm), (loss1, norm1) in zip(figures, figures1):
            assert abs(loss - loss1) <= 1e-12 * loss and abs(norm - norm1) <= 1e-12 * norm, kind
        for n, w in weights.items():
            assert (w - weights1[n]).abs().max() <= 1e-12, (kind, n)

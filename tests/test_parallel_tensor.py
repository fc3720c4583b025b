"Tensor parallelism is the same computation in every mode, and sends what its closed form says and no more"

import dataclasses

import pytest
import torch
from torch import Tensor

from internlm_nb.model.config import ModelConfig, family_defaults
from internlm_nb.model.init import init_weights
from internlm_nb.model.loss import LossOutput
from internlm_nb.model.transformer import Transformer, recompute
from internlm_nb.parallel import comm
from internlm_nb.parallel.comm import Axis
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.mesh import Mesh
from internlm_nb.parallel.placement import Placement, init_placed, placements_of, sum_partial
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.parallel.record import Recorder
from internlm_nb.parallel.tensor import tensor_parallel

LENGTHS = (7, 1, 12, 4)  # documents of a pack; none ends where a rank's tokens end
TOKENS = sum(LENGTHS)


def config(family: str, **changes) -> ModelConfig:
    "Small sizes, and what makes the family special"
    special: dict = {
        "internlm": dict(num_heads=4, num_kv_heads=4, max_position_embeddings=8),  # biases; dynamic rope, stretched by the third document
        "internlm2": dict(num_heads=8, num_kv_heads=4, norm_head=True, qk_interleaved=True, mlp_ratio=2.0),
        "llama": dict(num_heads=4, num_kv_heads=4),
    }[family]
    return ModelConfig(**{**family_defaults(family), "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "multiple_of": 8, "init_std": 0.1, **special, **changes})  # type: ignore[arg-type]


def pack(cfg: ModelConfig, seed: int) -> tuple[Tensor, Tensor]:
    "Ids and labels; some tokens have no target"
    g = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(cfg.vocab_size, (TOKENS,), generator=g) for _ in range(2))
    labels[torch.rand(TOKENS, generator=g) < 0.2] = -100
    return ids, labels


def offsets() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0)


def loss_of(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> LossOutput:
    out = model(ids, offsets(), labels=labels)
    assert isinstance(out, LossOutput)
    return out


def fill(model: torch.nn.Module, placements: dict[str, Placement]) -> None:
    "Every parameter random, norms and biases too, so that each has a gradient that can be wrong"
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            place = placements[name]
            whole = torch.randn(place.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            p.copy_(place.cut(1 + 0.2 * whole if name.endswith("norm.weight") else 0.15 * whole))


def train(cfg: ModelConfig, axis: Axis | None, mode: str, dtype: torch.dtype, policy: str = "none", embedding: str = "vocabulary", smoothing: float = 0.0, chunk: int = 10) -> dict:
    "Three steps of AdamW with one global norm: outputs and gradients of the first, and weights after the last, whole"
    model = Transformer(cfg, device="meta", dtype=dtype)
    placements = placements_of(model) if axis is None else tensor_parallel(model, axis, mode, embedding)  # type: ignore[arg-type]
    model.to_empty(device="cpu")
    fill(model, placements)
    recompute(model, 0.0 if policy == "none" else 1.0, "full" if policy == "none" else policy)  # type: ignore[arg-type]
    model.head.label_smoothing, model.head.chunk = smoothing, chunk
    whole = lambda tensors: {name: placements[name].whole(t, axis, "test") if axis else t for name, t in tensors.items()}  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    seen: dict = {}
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(2):
            out = loss_of(model, *pack(cfg, 10 * step + micro))
            out.loss_sum.backward()
            if not seen:
                seen = {"loss": out.loss_sum.detach(), "token_loss": out.token_loss, "correct": out.correct}
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(grads) == set(placements)
        if axis is not None:
            sum_partial(grads, placements, axis)
        squares = torch.stack([g.double().square().sum() for name, g in grads.items() if placements[name].counted]).sum()
        norm = (comm.all_reduce(squares, axis, "norm") if axis else squares).sqrt()
        if step == 0:
            seen |= {"norm": norm, "grads": {name: g.clone() for name, g in whole(grads).items()}}
        for g in grads.values():
            g.mul_(1.0 / norm)
        optimizer.step()
    return seen | {"weights": {name: t.clone() for name, t in whole({n: p.detach() for n, p in model.named_parameters()}).items()}}


def compare(have: dict, want: dict, dtype: torch.dtype, what: str) -> None:
    wide = dtype == torch.float64
    near = lambda a, b, tol, name: (  # noqa: E731
        torch.testing.assert_close(a, b, rtol=0, atol=tol * b.abs().max().item(), msg=lambda m: f"{what}, {name}: {m}")
    )
    near(have["loss"], want["loss"], 1e-12 if wide else 1e-5, "loss")
    near(have["token_loss"], want["token_loss"], 1e-12 if wide else 1e-5, "token_loss")
    near(have["norm"], want["norm"], 1e-12 if wide else 1e-5, "norm")
    assert torch.equal(have["correct"], want["correct"]), what
    for name, g in want["grads"].items():
        near(have["grads"][name], g, 1e-10 if wide else 1e-5, f"gradient of {name}")
    for name, w in want["weights"].items():
        near(have["weights"][name], w, 1e-10 if wide else 1e-5, f"{name} after three steps")


CASES = [
    # family, changes, mode, recomputation, embedding, smoothing
    *[("internlm", {}, mode, policy, "vocabulary", 0.1) for mode, policy in (("mtp", "none"), ("msp", "full"), ("fsp", "selective"))],
    *[("internlm2", {}, mode, policy, "hidden", 0.0) for mode, policy in (("mtp", "selective"), ("msp", "none"), ("fsp", "full"))],
    *[("llama", dict(tie_embeddings=True, embed_grad_scale=0.5), mode, policy, "vocabulary", 0.0) for mode, policy in (("mtp", "full"), ("msp", "selective"), ("fsp", "none"))],
    ("llama", {}, "mtp", "none", "vocabulary", 0.0),
]


def same_computation(mesh: Mesh) -> None:
    axis, alone = mesh.axis("tensor"), {}
    for family, changes, mode, policy, embedding, smoothing in CASES:
        cfg = config(family, **changes)
        key = family, str(changes), smoothing
        if key not in alone:
            alone[key] = train(cfg, None, "", torch.float64, smoothing=smoothing)
        have = train(cfg, axis, mode, torch.float64, policy, embedding, smoothing)
        compare(have, alone[key], torch.float64, f"{family} {changes} {mode} {policy} {embedding}")
        mesh.check_waited()
    cfg = config("internlm2")
    want = train(cfg, None, "", torch.float32)
    for mode in ("mtp", "msp", "fsp"):
        compare(train(cfg, axis, mode, torch.float32), want, torch.float32, f"float32 {mode}")


@pytest.mark.parametrize("world", [2, 4])
def test_any_mode_is_the_same_computation(world):
    run_ranks(same_computation, Layout(world, tensor=world), timeout=120)

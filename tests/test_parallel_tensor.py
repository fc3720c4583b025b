"Tensor parallelism is the same computation in every mode, and sends what its closed form says and no more"

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_nb.model.config import Family, ModelConfig, family_defaults
from internlm_nb.model.init import allocate, init_weights
from internlm_nb.model.loss import LossOutput
from internlm_nb.model.segments import Inputs, KVCache, Segments
from internlm_nb.model.transformer import Transformer, recompute
from internlm_nb.parallel import comm
from internlm_nb.parallel.comm import Axis
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.linear import column
from internlm_nb.parallel.mesh import Mesh, Place, destroy, init_distributed, make_mesh
from internlm_nb.parallel.placement import Placement, add_up, init_placed, placements_of
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.parallel.record import Recorder
from internlm_nb.parallel.tensor import tensor_parallel
from internlm_nb.parallel.traffic import by_purpose, tensor_traffic

LENGTHS = (7, 1, 12, 4)  # documents of a pack; none ends where a rank's tokens end
TOKENS = sum(LENGTHS)


def config(family: Family, **changes) -> ModelConfig:
    "Small sizes, and what makes the family special"
    special: dict = {
        "internlm": dict(
            num_heads=4, num_kv_heads=4, max_position_embeddings=8
        ),  # biases; dynamic rope, stretched by the third document
        "internlm2": dict(num_heads=8, num_kv_heads=4, norm_head=True, qk_interleaved=True, mlp_ratio=2.0),
        "llama": dict(num_heads=4, num_kv_heads=4),
    }[family]
    return ModelConfig(
        **{
            **family_defaults(family),
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "multiple_of": 8,
            "init_std": 0.1,
            **special,
            **changes,
        }
    )  # type: ignore[arg-type]


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


def train(
    cfg: ModelConfig,
    axis: Axis | None,
    mode: str,
    dtype: torch.dtype,
    policy: str = "none",
    smoothing: float = 0.0,
    chunk: int = 10,
) -> dict:
    "Three steps of AdamW with one global norm: outputs and gradients of the first, and weights after the last, whole"
    model = Transformer(cfg, device="meta", dtype=dtype)
    placements = placements_of(model) if axis is None else tensor_parallel(model, axis, mode)  # type: ignore[arg-type]
    allocate(model, "cpu")
    fill(model, placements)
    recompute(model, 0.0 if policy == "none" else 1.0, "full" if policy == "none" else policy)  # type: ignore[arg-type]
    model.head.label_smoothing, model.head.chunk = smoothing, chunk
    whole = lambda tensors: {  # noqa: E731
        name: placements[name].whole(t, axis, "test") if axis else t for name, t in tensors.items()
    }
    # eps: gradients are scaled to a norm of 1, and one that is rounding noise must not be blown up to a whole step
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, eps=1e-4)
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
            add_up([g for name, g in grads.items() if placements[name].partial], axis, "partial gradients")
        squares = torch.stack(
            [g.double().square().sum() for name, g in grads.items() if placements[name].counted]
        ).sum()
        norm = (comm.all_reduce(squares, axis, "norm") if axis else squares).sqrt()
        if step == 0:
            seen |= {"norm": norm, "grads": {name: g.clone() for name, g in whole(grads).items()}}
        for g in grads.values():
            g.mul_(1.0 / norm)
        optimizer.step()
    return seen | {
        "weights": {name: t.clone() for name, t in whole({n: p.detach() for n, p in model.named_parameters()}).items()}
    }


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
    # family, changes, mode, recomputation, smoothing
    *[("internlm", {}, mode, policy, 0.1) for mode, policy in (("mtp", "none"), ("msp", "full"), ("fsp", "selective"))],
    *[
        ("internlm2", {}, mode, policy, 0.0)
        for mode, policy in (("mtp", "selective"), ("msp", "none"), ("fsp", "full"))
    ],
    *[
        ("llama", dict(tie_embeddings=True, embed_grad_scale=0.5), mode, policy, 0.0)
        for mode, policy in (("mtp", "full"), ("msp", "selective"), ("fsp", "none"))
    ],
    ("llama", {}, "mtp", "none", 0.0),
]


def same_computation(mesh: Mesh, cases: list) -> None:
    axis, alone = mesh.axis("tensor"), {}
    for family, changes, mode, policy, smoothing in cases:
        cfg = config(family, **changes)
        key = family, str(changes), smoothing
        if key not in alone:
            alone[key] = train(cfg, None, "", torch.float64, smoothing=smoothing)
        have = train(cfg, axis, mode, torch.float64, policy, smoothing)
        compare(have, alone[key], torch.float64, f"{family} {changes} {mode} {policy}")
        mesh.check_waited()
    cfg = config("internlm2")
    want = train(cfg, None, "", torch.float32)
    for mode in ("mtp", "msp", "fsp"):
        compare(train(cfg, axis, mode, torch.float32), want, torch.float32, f"float32 {mode}")


@pytest.mark.parametrize("world, cases", [(2, CASES), pytest.param(4, CASES, marks=pytest.mark.slow)])
def test_any_mode_is_the_same_computation(world, cases):
    run_ranks(same_computation, Layout(world, tensor=world), cases, timeout=120)


# what is sent


def counted(recorder: Recorder) -> dict:
    "Counts by purpose; no purpose has two kinds of collective"
    assert len({purpose for _, purpose, _ in recorder.counts}) == len(recorder.counts)
    return {purpose: count for (_, purpose, _), count in recorder.counts.items()}


def cut_model(
    cfg: ModelConfig, axis: Axis, mode: str, dtype: torch.dtype = torch.float32
) -> tuple[Transformer, dict[str, Placement]]:
    model = Transformer(cfg, device="meta", dtype=dtype)
    placements = tensor_parallel(model, axis, mode)  # type: ignore[arg-type]
    allocate(model, "cpu")
    fill(model, placements)
    return model, placements


def heard(axis: Axis, recorder: Recorder) -> Recorder:
    "Let a recorder hear an axis of a mesh that was made without one"
    object.__setattr__(axis, "recorder", recorder)
    return recorder


def sends(mesh: Mesh) -> None:
    axis = mesh.axis("tensor")
    recorder = heard(axis, Recorder())
    for family, mode, policy, smoothing, dtype in [
        *[
            ("internlm", mode, policy, 0.1, torch.float32)
            for mode in ("mtp", "msp", "fsp")
            for policy in ("none", "full", "selective")
        ],
        *[("internlm2", mode, "none", 0.0, torch.bfloat16) for mode in ("mtp", "msp", "fsp")],
        ("llama", "fsp", "none", 0.0, torch.float64),
    ]:
        cfg = config(family)  # type: ignore[arg-type]
        model, placements = cut_model(cfg, axis, mode, dtype)
        recomputed = 0 if policy == "none" else 1  # of two blocks
        recompute(model, recomputed / 2, "full" if policy == "none" else policy)  # type: ignore[arg-type]
        model.head.label_smoothing, model.head.chunk = smoothing, 7
        recorder.reset()
        loss_of(model, *pack(cfg, 0)).loss_sum.backward()
        add_up(
            [p.grad for name, p in model.named_parameters() if placements[name].partial and p.grad is not None],
            axis,
            "partial gradients",
        )
        closed = by_purpose(
            tensor_traffic(cfg, TOKENS, axis.size, mode, dtype.itemsize, recomputed, smoothing > 0, chunk=7)
        )  # type: ignore[arg-type]
        assert counted(recorder) == closed, (family, mode, policy)
    assert not tensor_traffic(config("llama"), TOKENS, 1, "fsp")


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_of_the_closed_form(world):
    run_ranks(sends, Layout(world, tensor=world))


class Diary(Recorder):
    "Launches, waits and products, in order"

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def launch(self, call) -> None:
        self.lines.append(f"launch {call.purpose}")

    def wait(self, call) -> None:
        self.lines.append(f"wait {call.purpose}")


class Products(TorchDispatchMode):
    "Writes down each product by the shape of its result"

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if str(func) in ("aten.mm.default", "aten.addmm.default"):
            self.lines.append(f"product {tuple(out.shape)}")
        return out


def order(mesh: Mesh) -> None:
    axis = mesh.axis("tensor")
    diary = heard(axis, Diary())
    assert isinstance(diary, Diary)
    weights = [torch.randn(5, 8, requires_grad=True) for _ in range(2)]
    dx, dw = "product (6, 8)", "product (5, 8)"
    for mode, expected in {
        "mtp": [dx, dx, "launch t backward", dw, dw, "wait t backward"],
        "msp": [dx, dx, "launch t backward", dw, dw, "wait t backward"],
        "fsp": ["launch t again", dx, dx, "launch t backward", "wait t again", dw, dw, "wait t backward"],
    }.items():
        x = torch.randn(6 if mode == "mtp" else 3, 8, requires_grad=True)
        a, b = column(x, weights, (None, None), axis, mode, "t")  # type: ignore[arg-type]
        kept = [tuple(t.shape) for t in a.grad_fn.saved_tensors]  # type: ignore[union-attr]
        assert kept[0] == ((3, 8) if mode == "fsp" else (6, 8))
        diary.lines.clear()
        with Products(diary.lines):
            (a * b).sum().backward()
        assert diary.lines == expected, (mode, diary.lines)
        # what needs no gradient sends nothing for it
        frozen = [w.detach() for w in weights]
        diary.lines.clear()
        column(x, frozen, (None, None), axis, mode, "t")[0].sum().backward()  # type: ignore[arg-type]
        assert "launch t again" not in diary.lines
        diary.lines.clear()
        column(x.detach(), weights, (None, None), axis, mode, "t")[0].sum().backward()  # type: ignore[arg-type]
        assert "launch t backward" not in diary.lines


def test_exchanges_run_under_products():
    run_ranks(order, Layout(2, tensor=2))


# with the rest of the house


def together(mesh: Mesh) -> None:
    axis = mesh.axis("tensor")
    recorder = heard(axis, Recorder())
    cfg = config("internlm2")
    # compiled blocks, without a break in the graph: the same numbers, the same exchanges
    for mode in ("mtp", "msp", "fsp"):
        results = []
        for compiled in (False, True):
            model, _ = cut_model(cfg, axis, mode, torch.float64)
            for block in model.blocks if compiled else ():
                block.compile(backend="aot_eager", fullgraph=True)
            recorder.reset()
            out = loss_of(model, *pack(cfg, 0))
            out.loss_sum.backward()
            results.append((counted(recorder), [out.loss_sum.detach(), *(p.grad for p in model.parameters())]))
        assert results[0][0] == results[1][0], mode
        for a, b in zip(results[0][1], results[1][1]):
            assert a is not None and b is not None
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    # weights are drawn in place, bit for bit those of one process
    whole = Transformer(cfg)
    init_weights(whole, seed=5)
    model = Transformer(cfg, device="meta")
    placements = tensor_parallel(model, axis, "fsp")
    assert (
        list(placements)
        == [name for name, _ in whole.named_parameters()]
        == [name for name, _ in model.named_parameters()]
    )
    allocate(model, "cpu")
    recorder.reset()
    init_placed(model, placements, seed=5)
    assert not recorder.counts
    for name, p in model.named_parameters():
        assert torch.equal(p, placements[name].cut(whole.get_parameter(name))), name
    # logits, with and without gradients, and generation
    ids, labels = pack(cfg, 1)
    want = whole(ids, offsets())
    (grad,) = torch.autograd.grad(want.square().sum(), whole.embedding.weight)
    for mode in ("mtp", "msp", "fsp"):
        model = Transformer(cfg, device="meta")
        placements = tensor_parallel(model, axis, mode)  # type: ignore[arg-type]
        allocate(model, "cpu")
        init_placed(model, placements, seed=5)
        have = model(ids, offsets())
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-6)
        have.square().sum().backward()
        torch.testing.assert_close(
            model.embedding.weight.grad,
            placements["embedding.weight"].cut(grad),
            rtol=1e-4,
            atol=1e-5 * grad.abs().max().item(),
        )
        with torch.no_grad():
            torch.testing.assert_close(
                model(ids, offsets(), labels=labels).loss_sum,
                whole(ids, offsets(), labels=labels).loss_sum,
                rtol=1e-5,
                atol=0,
            )
        if mode == "mtp":
            texts = generate_ids(model, ids), generate_ids(whole, ids)
            assert texts[0] == texts[1]
        else:
            for refused in (dict(cache=KVCache.empty(4)), dict(last_only=True)):
                with pytest.raises(ValueError, match="generate in mode mtp"):
                    model(ids, offsets(), **refused)
            with pytest.raises(
                ValueError, match=f"23 tokens is not divisible by tensor {axis.size}, over which mode {mode} splits it"
            ):
                model(ids[:23])
            with pytest.raises(ValueError, match="give one label a token, of the whole pack"):
                model(ids, offsets(), labels=labels[: TOKENS // axis.size])
    mesh.check_waited()


def generate_ids(model: Transformer, ids: Tensor) -> list[int]:
    "Eight likeliest tokens after a pack's third document, through the cache"
    cache, out, given = KVCache.empty(1), [], ids[8:20]
    with torch.no_grad():
        for _ in range(8):
            logits = model(given, cache=cache, last_only=True)
            assert isinstance(logits, Tensor)
            given = logits.argmax(-1)
            out.append(int(given))
    return out


def test_compiled_filled_and_generating():
    run_ranks(together, Layout(2, tensor=2), timeout=120)


def second_opinion(mesh: Mesh) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    axis, cfg = mesh.axis("tensor"), config("internlm")
    theirs = Transformer(cfg, dtype=torch.float64)
    fill(theirs, placements_of(theirs))
    block = theirs.blocks[0]
    plan = {
        "attention.wqkv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(),
    }
    parallelize_module(block, DeviceMesh.from_group(axis.group, "cpu"), plan)  # type: ignore[arg-type]
    inputs = Inputs.of(cfg, pack(cfg, 0)[0], Segments.from_lengths(LENGTHS))
    positions = inputs.positions(cfg, torch.float64)
    x0, upstream = (
        torch.randn(TOKENS, cfg.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i in (0, 1)
    )
    x = x0.clone().requires_grad_()
    out = block(x, positions)
    (out * upstream).sum().backward()
    assert x.grad is not None
    for mode in ("mtp", "msp", "fsp"):
        model, placements = cut_model(cfg, axis, mode, torch.float64)
        rows = (
            slice(None)
            if mode == "mtp"
            else slice(axis.coord * TOKENS // axis.size, (axis.coord + 1) * TOKENS // axis.size)
        )
        a = x0[rows].clone().requires_grad_()
        mine = model.blocks[0](a, positions)
        (mine * upstream[rows]).sum().backward()
        near: dict = dict(rtol=0, atol=1e-11)  # numbers up to 1e2, sums in another order
        torch.testing.assert_close(mine, out[rows], **near)
        torch.testing.assert_close(a.grad, x.grad[rows], **near)
        own = {f"blocks.0.{name}": p.grad for name, p in model.blocks[0].named_parameters() if p.grad is not None}
        add_up([g for name, g in own.items() if placements[name].partial], axis, "partial gradients")
        for name, p in block.named_parameters():
            g = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            torch.testing.assert_close(own[f"blocks.0.{name}"], g, **near)


def test_dtensors_styles_say_the_same():
    run_ranks(second_opinion, Layout(2, tensor=2))


# before work starts


@pytest.mark.parametrize(
    "changes, mode, words",
    [
        (dict(num_heads=6, num_kv_heads=6, hidden_size=36), "mtp", "num_heads 6 is not divisible by tensor 4"),
        (dict(num_kv_heads=2), "mtp", "num_kv_heads 2 is not divisible by tensor 4"),
        (dict(intermediate_size=70), "mtp", "ffn_size 70 is not divisible by tensor 4"),
        (dict(vocab_size=66), "msp", "vocab_size 66 is not divisible by tensor 4.*pad vocab_size"),
        ({}, "isp", "mode is 'isp': choose one of mtp, msp, fsp"),
    ],
)
def test_what_does_not_fit_is_named(changes, mode, words):
    model = Transformer(config("internlm2", **changes), device="meta")
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        tensor_parallel(model, Axis("tensor", (0, 1, 2, 3), 1, 4), mode)
    assert [p.shape for p in model.parameters()] == shapes, "the model was changed"


def test_one_rank_changes_nothing():
    model = Transformer(config("llama"), device="meta")
    kinds = [type(m) for m in model.modules()]
    assert tensor_parallel(model, Axis("tensor", (0,), 0, 1), "fsp") == placements_of(model)
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize(
    "shape, dim", [((8, 6), 0), ((8, 6), 1), ((4, 2, 6), 1), ((4, 2, 6), 2), ((12,), 0), ((5, 3), None)]
)
def test_parts_tile_the_whole(shape, dim):
    size, whole = 2, torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [Placement(shape, dim, coord, size) for coord in range(size)]
    for p in parts:
        assert p.cut(whole).shape == p.local_shape
        assert torch.equal(torch.cat([whole.flatten()[a:b] for a, b in p.pieces()]), p.cut(whole).flatten())
        assert torch.equal(whole[tuple(slice(*ends) for ends in p.region)], p.cut(whole))
    seen = torch.cat([p.cut(whole).flatten() for p in parts if p.counted])
    assert sorted(seen.tolist()) == list(range(whole.numel()))  # `counted` counts each element once


def test_a_step_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    cfg, recorder = config("internlm2"), Recorder()
    init_distributed("fake", place=Place(3, 4, 0))
    try:
        axis = make_mesh(Layout(4, tensor=4), recorder=recorder).axis("tensor")
        for mode in ("mtp", "msp", "fsp"):
            model = Transformer(cfg, device="meta", dtype=torch.bfloat16)
            tensor_parallel(model, axis, mode)
            recorder.reset()
            with FakeTensorMode():
                for module in model.modules():
                    for name, p in list(module.named_parameters(recurse=False)):
                        setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype)))
                ids = torch.zeros(64, dtype=torch.int64)
                out = model(ids, labels=ids)
                assert isinstance(out, LossOutput)
                out.loss_sum.backward()
            closed = by_purpose(tensor_traffic(cfg, 64, 4, mode))
            closed.pop("partial gradients", None)
            assert counted(recorder) == closed
    finally:
        destroy()

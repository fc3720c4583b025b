"Ring attention alone: right in every shape, its messages as few as the lengths allow, on their way under the work, and its memory not quadratic"

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_nb.model.attention import attention, reference_attention
from internlm_nb.model.config import ModelConfig, family_defaults
from internlm_nb.model.segments import Segments
from internlm_nb.parallel.blockwise import (
    combine,
    has_flash,
    partial_attention,
    partial_grads,
    plain_grads,
    plain_partial,
)
from internlm_nb.parallel.context import ring_attention
from internlm_nb.parallel.layout import Coords, Layout
from internlm_nb.parallel.mesh import Mesh, make_mesh
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.parallel.record import Recorder
from internlm_nb.parallel.sequence import cut_rows
from internlm_nb.parallel.traffic import by_purpose, context_traffic

F64 = torch.float64


def draw_tensors(tokens: int, heads: int, kv_heads: int, seed: int, dtype: torch.dtype = F64, spread: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [(spread * torch.randn(tokens, n, 8, generator=g, dtype=F64)).to(dtype).requires_grad_() for n in sizes]


def draw_lengths(pick: random.Random, tokens: int) -> tuple[int, ...]:
    count = pick.choice([0, 1, 2, 5, tokens // 2])
    borders = sorted(pick.sample(range(1, tokens), min(count, tokens - 1)))
    return tuple(b - a for a, b in zip([0, *borders], [*borders, tokens]))


def heard(mesh: Mesh, recorder: Recorder) -> Recorder:
    object.__setattr__(mesh.axis("context"), "recorder", recorder)
    return recorder


def small(heads: int, kv_heads: int) -> ModelConfig:
    sizes: dict = dict(
        vocab_size=64, hidden_size=8 * heads, num_layers=1, num_heads=heads, num_kv_heads=kv_heads, multiple_of=8
    )
    return ModelConfig(**{**family_defaults("llama"), **sizes})  # type: ignore[arg-type]


def against_reference(seeds: range, world: int) -> None:
    mesh = make_mesh(Layout(world, context=world), timeout=60)
    axis, recorder = mesh.axis("context"), heard(mesh, Recorder())
    for seed in seeds:
        pick = random.Random(f"ring {seed}")
        heads, kv_heads = pick.choice([(4, 4), (4, 2), (6, 2), (3, 1)])
        tokens = 2 * world * pick.randint(1, 12)
        lengths = draw_lengths(pick, tokens)
        dtype, spread = pick.choice(
            [(F64, 1.0), (F64, 8.0), (torch.float32, 1.0)]
        )  # with spread 8 some scores are in the hundreds: sums must be shifted
        q, k, v, grad = draw_tensors(tokens, heads, kv_heads, seed, dtype, spread)
        whole = Segments.from_lengths(lengths)
        expected = reference_attention(q, k, v, whole, whole, True, 8**-0.5)
        wanted = torch.autograd.grad(expected, (q, k, v), grad)
        rows, local = cut_rows(lengths, mesh.layout, mesh.coords)
        own = [x.detach()[rows].requires_grad_() for x in (q, k, v)]
        recorder.reset()
        out = ring_attention(attention, axis, *own, local)  # type: ignore[misc]
        have = torch.autograd.grad(out, own, grad.detach()[rows])
        tolerance = 1e-12 if dtype == F64 else 2e-6
        for name, a, b in zip(("out", "q", "k", "v"), (out, *have), (expected, *wanted)):
            size = (
                b.abs().max().clamp(min=spread**3)
            )  # where one key takes all, gradients are differences of products of three such numbers
            assert (a - b[rows]).abs().max() <= tolerance * size, (seed, name, lengths)
        closed = by_purpose(context_traffic(small(heads, kv_heads), lengths, mesh.layout, mesh.coords, dtype.itemsize))
        assert {purpose: count for (_, purpose, _), count in recorder.counts.items()} == closed, (seed, lengths)
        with torch.no_grad():
            assert torch.equal(ring_attention(attention, axis, *own, local), out), (
                "with and without gradients it is one computation"
            )  # type: ignore[misc]
        mesh.check_waited()


@pytest.mark.parametrize("world, seeds", [(2, range(12)), (4, range(12)), (3, range(6))])
def test_ring_is_attention(world, seeds):
    run_ranks(against_reference, world, seeds, world, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4, 5, 8])
def test_ring_is_attention_sweep(world):
    run_ranks(against_reference, world, range(100, 200), world, timeout=300)


def test_bytes_of_one_document():
    "From the zigzag alone: a rank's first chunk goes to those of higher number, both chunks to those of lower"
    cfg = small(4, 2)
    for size, chunk in ((2, 1), (3, 5), (4, 8), (8, 16)):
        layout, row = Layout(size, context=size), 2 * 2 * 8 * 2
        counts = [by_purpose(context_traffic(cfg, (2 * size * chunk,), layout, Coords(context=r))) for r in range(size)]
        assert [c["ring"].payload_bytes for c in counts] == [chunk * (size - 1 + r) * row for r in range(size)]
        everything = size * (size - 1) * 2 * chunk * row  # if each rank's keys went to each other rank
        assert 4 * sum(c["ring"].payload_bytes for c in counts) == 3 * everything
        assert sum(c["ring gradients"].payload_bytes for c in counts) == 2 * sum(
            c["ring backward"].payload_bytes for c in counts
        )  # float32 against bfloat16
    assert not context_traffic(cfg, (4,) * 8, Layout(4, context=4), Coords())
    assert not context_traffic(cfg, (32,), Layout(1), Coords())


# overlap


class Diary(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def launch(self, call) -> None:
        self.lines.append(f"launch {call.purpose}")

    def wait(self, call) -> None:
        self.lines.append(f"wait {call.purpose}")


class Products(TorchDispatchMode):
    "Writes down products, those that follow each other once"

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "bmm" in str(func) and self.lines[-1:] != ["compute"]:
            self.lines.append("compute")
        return func(*args, **(kwargs or {}))


def order(mesh: Mesh) -> None:
    diary = heard(mesh, Diary())
    assert isinstance(diary, Diary)
    rows, local = cut_rows((64,), mesh.layout, mesh.coords)
    q, k, v, grad = draw_tensors(len(rows), 4, 2, 0)
    with Products(diary.lines):
        out = ring_attention(attention, mesh.axis("context"), q, k, v, local)
    expected = [
        "launch ring",
        "compute",
        "launch ring",
        "wait ring",
        "compute",
        "launch ring",
        "wait ring",
        "compute",
        "wait ring",
        "compute",
    ]
    assert diary.lines == expected, diary.lines
    diary.lines.clear()
    with Products(diary.lines):
        out.backward(grad)
    keys, home = "ring backward", "ring gradients"
    assert diary.lines == [
        *(f"launch {keys}", "compute"),
        *(f"launch {keys}", f"wait {keys}", "compute", f"launch {home}"),
        *(f"launch {keys}", f"wait {keys}", "compute", f"launch {home}", f"wait {home}"),
        *(f"wait {keys}", "compute", f"launch {home}", f"wait {home}", f"wait {home}"),
    ], diary.lines


def test_messages_run_under_the_work():
    run_ranks(order, Layout(4, context=4))


# memory


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def long_document(mesh: Mesh) -> None:
    tokens = 12288
    rows, local = cut_rows((tokens,), mesh.layout, mesh.coords)
    q, k, v, grad = (x[:, :1].detach().requires_grad_() for x in draw_tensors(len(rows), 1, 1, 0, torch.float32))
    held = {}
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(t.data_ptr(), t), lambda t: t),
    ):
        ring_attention(attention, mesh.axis("context"), q, k, v, local).backward(grad)
    assert largest.numel <= 2**22 < len(rows) ** 2 / 8  # scores of one block at most
    assert sum(t.numel() for t in held.values()) == len(rows) * (
        8 + 2 * 8 + 8 + 1
    )  # q, keys and values, output, log-sum-exp


def test_nothing_quadratic_is_made_or_kept():
    run_ranks(long_document, Layout(2, context=2), timeout=100)


# partial attention


@pytest.mark.parametrize("causal, queries, keys", [(True, 37, 37), (False, 37, 61), (False, 1, 1), (True, 1, 1)])
def test_blocks_do_not_matter(causal, queries, keys):
    q, k, v, grad = (draw_tensors(n, h, h, 1)[0] for n, h in ((queries, 4), (keys, 2), (keys, 2), (queries, 4)))
    expected = reference_attention(
        q, k, v, Segments.from_lengths([queries]), Segments.from_lengths([keys]), causal, 0.4
    )
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.no_grad():
        for most in (1, 2**22):
            out, lse = plain_partial(q, k, v, causal, 0.4, most)
            have = plain_grads(grad, q, k, v, out, lse, causal, 0.4, most)
            for a, b in zip((out, *have), (expected, *wanted)):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_parts_far_apart_combine():
    "Scores of one part a thousand above the other's: its share is then nothing, not a nan"
    out, lse = torch.ones(1, 1, 4), torch.full((1, 1), 1000.0)
    combine(out, lse, torch.full((1, 1, 4), 5.0), torch.zeros(1, 1))
    assert torch.equal(out, torch.ones(1, 1, 4)) and lse.item() == 1000
    combine(out, lse, torch.full((1, 1, 4), 5.0), torch.full((1, 1), 3000.0))
    assert torch.equal(out, torch.full((1, 1, 4), 5.0)) and lse.item() == 3000


def test_flash_kernels_are_called_right(monkeypatch):
    "Without a GPU at least the operators' signatures and shapes"
    monkeypatch.setattr("internlm_nb.parallel.blockwise.has_flash", lambda x: True)
    q, k, v, grad = (
        torch.empty(n, h, 64, dtype=torch.bfloat16, device="meta") for n, h in ((100, 8), (257, 2), (257, 2), (100, 8))
    )
    out, lse = partial_attention(q, k, v, False, 0.1)
    assert out.shape == q.shape and lse.shape == (100, 8) and out.dtype == lse.dtype == torch.float32
    assert [x.shape for x in partial_grads(grad, q, k, v, out, lse, False, 0.1)] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "causal, queries, keys", [(True, 300, 300), (False, 100, 257), (False, 257, 100), (True, 1, 1)]
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_kernels_give_the_same_parts(causal, queries, keys, head_dim):
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(n, h, head_dim, generator=g).to("cuda", torch.bfloat16)
        for n, h in ((queries, 8), (keys, 2), (keys, 2), (queries, 8))
    )
    assert has_flash(q)
    other_k, other_v = (torch.randn(50, 2, head_dim, generator=g).to("cuda", torch.bfloat16) for _ in range(2))
    results = []
    for forward, backward in ((partial_attention, partial_grads), (plain_partial, plain_grads)):
        out, lse = forward(q, k, v, causal, 0.1)
        combine(out, lse, *forward(q, other_k, other_v, False, 0.1))
        out = out.to(torch.bfloat16)
        results.append((out.float(), lse, *backward(grad, q, k, v, out, lse, causal, 0.1)))
    for a, b in zip(*results):
        assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
        assert (a - b).abs().max() <= 0.02 * b.abs().max()  # a few roundings to bfloat16

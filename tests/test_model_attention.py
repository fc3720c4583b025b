"All attention backends equal the plain reference, on random packs; caches and positions"

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.model import attention as module
from internlm_nb.model.attention import BACKENDS, Segments, attention, choose_backend, describe_backend, why_not
from internlm_nb.model.segments import KVCache, interleave

PACKS = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)
ON_CPU = [b for b in BACKENDS if why_not(b, "cpu", torch.float64, 16) is None]


def tensors(queries: int, keys: int, kv: int, group: int, dtype, seed: int, device="cpu", head_dim=8):
    g = torch.Generator().manual_seed(seed)
    shapes = ((queries, kv * group, head_dim), (keys, kv, head_dim), (keys, kv, head_dim))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def by_hand(q, k, v, query_lengths, key_lengths):
    "Attention of each query in a Python loop over sequences, heads and positions"
    out, scale, group = torch.zeros_like(q), q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    q0 = k0 = 0
    for nq, nk in zip(query_lengths, key_lengths):
        for i in range(nq):
            seen = slice(k0, k0 + nk - nq + i + 1)
            for h in range(q.shape[1]):
                p = (k[seen, h // group] @ q[q0 + i, h] * scale).softmax(0)
                out[q0 + i, h] = p @ v[seen, h // group]
        q0, k0 = q0 + nq, k0 + nk
    return out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pack=PACKS,
    past=st.lists(st.integers(0, 6), min_size=6, max_size=6),
    cached=st.booleans(),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_backends_equal_the_definition_in_float64(pack, past, cached, kv, group, seed):
    "Outputs to 1e-12 and gradients to 1e-12 of the reference's; the reference to a loop over positions"
    keys = [n + p for n, p in zip(pack, past)] if cached else pack
    q, k, v = tensors(sum(pack), sum(keys), kv, group, torch.float64, seed)
    s, ks = Segments.from_lengths(pack), Segments.from_lengths(keys) if cached else None
    want = attention(q, k, v, s, "reference", ks)
    assert torch.allclose(want, by_hand(q.detach(), k.detach(), v.detach(), pack, keys), rtol=0, atol=1e-13)
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    want_grads = torch.autograd.grad(want, (q, k, v), probe)
    for backend in ON_CPU:
        got = attention(q, k, v, s, backend, ks)
        assert torch.allclose(got, want, rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), probe), want_grads):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 2e-6), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
@pytest.mark.parametrize("lengths", [(40,), (8, 8, 8), (1, 30, 9)])
def test_narrow_types(dtype, tol, lengths):
    "float32 to a few units of rounding; 16-bit types to a few units of theirs (2^-8 and 2^-11), values being of order 1"
    q, k, v = tensors(sum(lengths), sum(lengths), 2, 2, dtype, 0)
    s = Segments.from_lengths(lengths)
    wide = attention(q.double(), k.double(), v.double(), s, "reference")
    for backend in ON_CPU:
        got = attention(q, k, v, s, backend)
        assert got.dtype == dtype and (got.double() - wide).abs().max() < tol * max(1.0, wide.abs().max().item())


def test_not_causal():
    q, k, v = tensors(7, 7, 2, 2, torch.float64, 0)
    s = Segments.from_lengths([3, 4])
    a, b = (attention(q, k, v, s, backend, causal=False) for backend in ("reference", "sdpa"))
    assert torch.allclose(a, b, atol=1e-13)
    assert not torch.allclose(a, attention(q, k, v, s))


@pytest.mark.parametrize("grouped_kernel", [True, False])
def test_the_varlen_kernel_is_called_as_it_wants(monkeypatch, grouped_kernel):
    "With PyTorch's signature, standing in for the kernel: causal is window (-1, 0), and heads are repeated for releases without enable_gqa"
    seen = {}

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **options):
        seen.update(options, window_size=window_size, max=(max_q, max_k), kv=key.shape[1])
        q_lengths, k_lengths = (Segments.of(c) for c in (cu_seq_q, cu_seq_k))
        return module.reference_attention(query, key, value, q_lengths, k_lengths, window_size == (-1, 0), scale)

    monkeypatch.setattr(module, "torch_varlen", lambda: (kernel, grouped_kernel))
    monkeypatch.setattr(module, "why_not", lambda *a: None)
    q, k, v = tensors(5, 9, 2, 3, torch.float64, 1)
    s, ks = Segments.from_lengths([2, 3]), Segments.from_lengths([4, 5])
    assert torch.allclose(attention(q, k, v, s, "varlen", ks), attention(q, k, v, s, "reference", ks), atol=1e-14)
    assert seen["window_size"] == (-1, 0) and seen["max"] == (3, 5)
    assert (seen.get("enable_gqa"), seen["kv"]) == ((True, 2) if grouped_kernel else (None, 6))


def test_the_flash_kernel_is_called_as_it_wants(monkeypatch):
    "With flash_attn's signature, standing in for the package"

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        assert (max_seqlen_q, max_seqlen_k, dropout_p, cu_seqlens_q.dtype) == (3, 5, 0.0, torch.int32)
        return module.reference_attention(
            q, k, v, Segments.of(cu_seqlens_q), Segments.of(cu_seqlens_k), causal, softmax_scale
        )

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(module, "why_not", lambda *a: None)
    q, k, v = tensors(5, 9, 2, 3, torch.float64, 1)
    s, ks = Segments.from_lengths([2, 3]), Segments.from_lengths([4, 5])
    assert choose_backend("cuda", torch.bfloat16, 64) == "flash"
    assert torch.allclose(attention(q, k, v, s, "flash", ks), attention(q, k, v, s, "reference", ks), atol=1e-14)


@pytest.mark.parametrize(
    "dtype,head_dim,capability,reason",
    [
        (torch.bfloat16, 128, (9, 0), None),
        (torch.float32, 128, (9, 0), "float16 or bfloat16, not float32"),
        (torch.bfloat16, 512, (9, 0), "at most 256, not 512"),
        (torch.bfloat16, 12, (9, 0), "multiple of 8"),
        (torch.bfloat16, 128, (7, 5), "compute capability 8.0"),
    ],
)
def test_what_a_gpu_kernel_asks_for(monkeypatch, dtype, head_dim, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    got = why_not("varlen", "cuda", dtype, head_dim)
    assert got is None if reason is None else reason in got
    assert choose_backend("cuda", dtype, head_dim) == ("varlen" if reason is None else "sdpa")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert why_not("varlen", "cuda", dtype, head_dim) is not None


def test_the_real_signature_has_what_is_used():
    kernel, _ = module.torch_varlen()
    names = list(inspect.signature(kernel).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"] and {
        "scale",
        "window_size",
    } <= set(names)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,tol", [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("backend", ["flash", "varlen", "sdpa"])
def test_gpu_backends(backend, dtype, tol, past):
    if reason := why_not(backend, "cuda", dtype, 64):
        pytest.skip(reason)
    lengths = (1, 70, 128, 33)
    q, k, v = tensors(sum(lengths), sum(lengths) + past * 4, 2, 4, dtype, 0, "cuda", 64)
    s = Segments.from_lengths(lengths, "cuda")
    ks = Segments.from_lengths([n + past for n in lengths], "cuda") if past else None
    want, got = attention(q, k, v, s, "reference", ks), attention(q, k, v, s, backend, ks)
    assert (want - got).abs().max() < tol * want.abs().max()
    probe = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), probe), torch.autograd.grad(want, (q, k, v), probe)):
        assert (a - b).abs().max() < 2 * tol * b.abs().max()


def test_availability_is_explained():
    assert choose_backend("cpu", torch.bfloat16, 128) == "chunked"
    assert (
        choose_backend("cpu", torch.bfloat16, 128, training=False)
        == choose_backend("cpu", torch.float32, 128)
        == "sdpa"
    )
    line = describe_backend("cpu", torch.bfloat16, 128)
    assert (
        line.startswith("attention backend chunked in training, sdpa without gradients (not flash: ")
        and "not varlen: it needs a CUDA device, not cpu" in line
    )
    assert "not chunked: PyTorch's kernel was measured faster" in describe_backend("cpu", torch.float32, 128)
    with pytest.raises(ValueError, match="choose auto or one of flash, varlen, cudnn, chunked, sdpa, reference"):
        attention(*tensors(3, 3, 1, 1, torch.float32, 0), Segments.from_lengths([3]), "fastest")


def test_what_does_not_fit_is_refused():
    q, k, v = tensors(4, 4, 2, 2, torch.float32, 0)
    s = Segments.from_lengths([4])
    for bad, message in (
        (lambda: attention(q, k[:3], v[:3], s), "do not fit segments"),
        (lambda: attention(q, k, v[:, :1], s), "do not fit segments"),
        (lambda: attention(q[:, :3], k, v, s), "2 key heads do not divide 3 query heads"),
        (lambda: attention(q, k, v, s, key_segments=Segments.from_lengths([2, 2])), "do not cover"),
        (
            lambda: attention(q, k, v, Segments.from_lengths([3, 1]), key_segments=Segments.from_lengths([2, 2])),
            "at least as many keys",
        ),
        (lambda: Segments.of([0]), "must begin with 0"),
        (lambda: Segments.from_lengths([]), "at least one sequence"),
        (lambda: Segments.from_lengths([3, -1]), "no negative length"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5),
    rows=st.lists(st.integers(0, 2), max_size=5),
)
def test_interleave_and_select_are_lists_of_sequences(steps, rows):
    "A pack of sequences behaves as a Python list of lists"
    lists: list[list[int]] = [[], [], []]
    packed, lengths, counter = torch.zeros(0, dtype=torch.int64), [0, 0, 0], 0
    cache = KVCache.empty(3)
    for step in steps:
        new = [list(range(counter + 10 * i, counter + 10 * i + n)) for i, n in enumerate(step)]
        counter += 100
        flat = torch.tensor([t for part in new for t in part], dtype=torch.int64)
        packed = interleave(packed, lengths, flat, step)
        cache.extend(0, flat, flat, Segments.from_lengths(step))
        lists = [a + b for a, b in zip(lists, new)]
        lengths = [len(a) for a in lists]
        cache.lengths = tuple(lengths)
        assert packed.tolist() == [t for part in lists for t in part] == cache.entries[0][0].tolist()
    cache.select(rows)
    assert cache.entries[0][1].tolist() == [t for r in rows for t in lists[r]] and list(cache.lengths) == [
        len(lists[r]) for r in rows
    ]

"The cache's buffers hold what lists of sequences would, whatever is done with them; decoding equals packed attention and whole passes; a step moves no past"

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_model_transformers import CASES, ours

from internlm_nb.model.attention import reference_attention
from internlm_nb.model.decode import Linear, Step, align, decode_attention, thin_linear, unalign
from internlm_nb.model.segments import KVCache, Segments

ACTIONS = st.one_of(
    st.just(("step",)),
    st.tuples(st.just("pass"), st.lists(st.integers(0, 3), min_size=9, max_size=9)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 8), min_size=1, max_size=9)),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(first=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), actions=st.lists(ACTIONS, max_size=12))
@example(first=[5, 3], actions=[("select", [1, 1]), ("step",), ("step",), ("select", [1, 0]), ("step",)])
@example(
    first=[2, 4, 1],
    actions=[
        ("step",),
        ("select", [0, 0, 2]),
        ("step",),
        ("select", [1, 2, 0]),
        ("step",),
        ("select", [2, 0, 0, 1]),
        ("step",),
        ("select", [3, 3]),
    ],
)
def test_a_cache_is_lists_of_sequences(first, actions):
    "Steps in place, passes of any lengths and selections of rows, in any order and in two layers"
    counter = iter(range(1, 10_000))
    lists, cache = [[] for _ in first], KVCache.empty(len(first))

    def add(lengths, in_place):
        nonlocal lists
        new = [[next(counter) for _ in range(n)] for n in lengths]
        flat = torch.tensor([t for part in new for t in part], dtype=torch.int64).view(-1, 1, 1)
        for layer in (0, 1):
            if in_place:
                k, v = (x.clone() for x in cache.put(layer, flat.unsqueeze(1), -flat.unsqueeze(1)))
                for row, (part, old) in enumerate(zip(new, lists)):
                    here, unused = k[row].flatten().tolist(), k.shape[2] - len(old) - 1
                    assert here == [0] * unused + old + part and torch.equal(k, -v)
            else:
                k, _ = cache.extend(layer, flat, -flat, Segments.from_lengths(lengths))
                assert k.flatten().tolist() == [t for old, part in zip(lists, new) for t in old + part]
        lists = [old + part for old, part in zip(lists, new)]
        cache.lengths = tuple(len(x) for x in lists)

    with torch.no_grad():
        add(first, False)
        for action in actions:
            if action[0] == "step":
                add([1] * len(lists), True)
            elif action[0] == "pass":
                add(action[1][: len(lists)], False)
            else:
                rows = [r % len(lists) for r in action[1]]
                cache.select(rows)
                lists = [lists[r] for r in rows]
            for layer in (0, 1):
                k, v = cache.packed(layer)
                assert (
                    k is not None
                    and v is not None
                    and k.flatten().tolist() == [t for x in lists for t in x]
                    and torch.equal(k, -v)
                )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    group=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_decode_attention_equals_the_reference(lengths, group, dtype):
    "One to a few roundings of the type: float64 1e-13, float32 1e-5, bfloat16 one step of its 8 bits"
    generator = torch.Generator().manual_seed(sum(lengths))
    ends = [n + 1 for n in lengths]
    q = torch.randn(len(lengths), 2 * group, 16, generator=generator).to(dtype)
    k, v = (torch.randn(sum(ends), 2, 16, generator=generator).to(dtype) for _ in range(2))
    want = reference_attention(q, k, v, Segments.from_lengths([1] * len(ends)), Segments.from_lengths(ends), True, 0.25)
    aligned = [align(x, ends, max(ends), max(ends) + 3) for x in (k, v)]
    assert all(torch.equal(unalign(a, ends, max(ends)), x) for a, x in zip(aligned, (k, v)))
    seen_k, seen_v = (a[:, :, : max(ends)] for a in aligned)
    got = decode_attention(q, seen_k, seen_v, Step.of(lengths).mask)
    assert (
        got.dtype == dtype
        and (got - want).abs().max()
        <= {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype] * want.abs().max()
    )


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 17])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_thin_products_equal_linear(rows, shape):
    "In float32 within the rounding of 48 terms, contiguous, and gradients as ever"
    layer = Linear(shape[1], shape[0])
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        got = layer(x)
    want = F.linear(x, layer.weight, layer.bias)
    assert got.shape == want.shape and got.is_contiguous() and torch.allclose(got, want, rtol=0, atol=1e-5)
    assert torch.equal(layer(x), want) and layer(x).requires_grad
    with torch.no_grad():
        assert torch.equal(thin_linear(x.double(), layer.weight.double()), F.linear(x.double(), layer.weight.double()))


@pytest.mark.parametrize("case", ["internlm2", "internlm", "dynamic"])
@pytest.mark.parametrize("dtype,within", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_steps_passes_and_gradients_mix(case, dtype, within):
    "Steps, a longer pass, steps, and a pass with gradients through one cache give what whole passes give"
    model = ours(CASES[case], dtype)
    texts = [torch.randint(0, 97, (n + 12,), generator=torch.Generator().manual_seed(n)) for n in (3, 11, 1)]
    cache, done = KVCache.empty(3), [0, 0, 0]
    for lengths, grad in (
        ((3, 11, 1), False),
        ((1, 1, 1), False),
        ((1, 1, 1), False),
        ((3, 0, 2), False),
        ((1, 1, 1), False),
        ((1, 1, 1), True),
        ((2, 1, 1), True),
        ((1, 1, 1), False),
    ):
        with torch.set_grad_enabled(grad):
            got = model(
                torch.cat([t[d : d + n] for t, d, n in zip(texts, done, lengths)]),
                Segments.from_lengths(lengths),
                cache=cache,
            )
        done = [d + n for d, n in zip(done, lengths)]
        with torch.no_grad():
            want = torch.cat([model(t[:d])[d - n :] if n else got[:0] for t, d, n in zip(texts, done, lengths)])
        assert got.requires_grad == grad and (got - want).abs().max() <= within * want.abs().max()


def test_a_step_moves_no_past():
    "While there is room, keys stay where they are in memory, for a batch of unequal lengths too; rows that stay are not copied"
    model, cache = ours(CASES["internlm2"]), KVCache.empty(2)
    with torch.no_grad():
        model(torch.arange(8), Segments.from_lengths([5, 3]), cache=cache)
        places = []
        for _ in range(30):
            model(torch.tensor([1, 2]), Segments.from_lengths([1, 1]), cache=cache)
            places.append([x.data_ptr() for pair in cache.room.values() for x in pair])
    assert not cache.entries and all(p == places[0] for p in places)
    cache.select([0])
    assert [x.data_ptr() for pair in cache.room.values() for x in pair] == places[0]

"The model's laws: documents are alone in a pack, recomputation changes nothing, layers can be traced, nothing is read back from a device"

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from internlm_nb.model.attention import Segments
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.flops import step_flops
from internlm_nb.model.generate import Sampling, generate, stream
from internlm_nb.model.init import BLOCK, allocate, init_weights, normal_slice
from internlm_nb.model.layers import RMSNorm, rms_norm
from internlm_nb.model.segments import Inputs, KVCache, Positions
from internlm_nb.model.transformer import Transformer, recompute

CFG = ModelConfig("internlm2", 61, 32, 3, 4, 2, 2.0, multiple_of=16, max_position_embeddings=8, init_std=0.2)
VARIANTS = {
    "internlm2": CFG,
    "internlm": replace(CFG, num_kv_heads=4, qkv_bias=True, out_bias=True, rope_scaling="dynamic", rope_factor=2.0),
    "interleaved": replace(CFG, qk_interleaved=True, norm_head=True, rope_scaling="linear", rope_factor=2.0),
    "tied": replace(CFG, tie_embeddings=True, embed_grad_scale=0.1),
}


def ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (n,), generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer, tokens, segments) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, segments, labels=tokens.roll(-1)).loss_sum.backward()
    return {n: p.grad for n, p in model.named_parameters()}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any), variant=st.sampled_from(sorted(VARIANTS))
)
def test_documents_are_alone_in_a_pack(lengths, variant):
    "Logits, losses and gradients of a pack are those of its documents: 1e-12 in float64"
    model, tokens = Transformer(VARIANTS[variant], dtype=torch.float64), ids(sum(lengths))
    labels = tokens.roll(-1)
    packed = model(tokens, torch.tensor([0, *torch.tensor(lengths).cumsum(0)]))
    out = model(tokens, Segments.from_lengths(lengths), labels=labels)
    out.loss_sum.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(t) for t in tokens.split(lengths) if len(t)]
    assert torch.allclose(packed, torch.cat(alone), rtol=0, atol=1e-12)
    total = sum(model(t, labels=y).loss_sum for t, y in zip(tokens.split(lengths), labels.split(lengths)) if len(t))
    total.backward()
    assert torch.allclose(out.loss_sum, total, rtol=1e-13)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, grads[name], rtol=0, atol=1e-11), name


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    steps=st.lists(st.integers(1, 3), max_size=4),
    variant=st.sampled_from(sorted(VARIANTS)),
)
def test_cached_equals_full(prompts, steps, variant):
    "Any cut of texts into passes gives the logits of the whole texts so far; dynamic scaling beyond the trained length included"
    model, texts = (
        Transformer(VARIANTS[variant], dtype=torch.float64),
        [ids(n + sum(steps), row) for row, n in enumerate(prompts)],
    )
    cache, done = KVCache.empty(len(prompts)), [0] * len(prompts)
    with torch.no_grad():
        for step in [prompts] + [[n] * len(prompts) for n in steps]:
            got = model(
                torch.cat([t[d : d + n] for t, d, n in zip(texts, done, step)]),
                Segments.from_lengths(step),
                cache=cache,
            )
            done = [d + n for d, n in zip(done, step)]
            want = torch.cat([model(t[:d])[d - n :] for t, d, n in zip(texts, done, step)])
            assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_positions_may_be_given():
    model = Transformer(CFG, dtype=torch.float64)
    tokens = ids(6)
    a = model(tokens, torch.tensor([0, 2, 6]), torch.tensor([0, 1, 0, 1, 2, 3]), 4)
    assert torch.equal(a, model(tokens, Segments.from_lengths([2, 4])))
    shifted = model(tokens, torch.tensor([0, 2, 6]), torch.tensor([5, 6, 9, 10, 11, 12]))
    assert torch.allclose(a, shifted, atol=1e-12)  # rotary positions know distances only
    assert not torch.allclose(a, model(tokens, torch.tensor([0, 2, 6]), torch.tensor([0, 2, 0, 2, 4, 6])), atol=1e-3)
    for bad, message in (
        (lambda: model(tokens, torch.tensor([0, 7])), "ends at 7, but there are 6 tokens"),
        (lambda: model(tokens, torch.tensor([1, 6])), "must begin with 0"),
        (lambda: model(tokens, max_seqlen=5), "max_seqlen is 5, but a sequence has 6"),
        (lambda: model(tokens.float()), "packed integer ids"),
        (lambda: model(tokens[:0]), "packed integer ids"),
        (lambda: model(-tokens - 1), "outside the vocabulary"),
        (lambda: model(tokens, cache=KVCache.empty(2)), "the cache holds 2 sequences"),
        (lambda: model(tokens, torch.tensor([0, 0, 6]), last_only=True), "sequence 0 is empty"),
        (lambda: recompute(model, 1.5), "between 0 and 1"),
        (lambda: recompute(model, 0.5, "some"), "choose full or selective"),
        (lambda: Sampling(temperature=-1), "temperature is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputation_is_bit_equal_and_hooks_fire_once(variant, policy):
    model, tokens, segments = Transformer(VARIANTS[variant]), ids(20), Segments.from_lengths([7, 1, 12])
    plain = gradients(model, tokens, segments)
    fired = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *a, i=i: fired.append(("before", i)))
        block.register_forward_hook(lambda *a, i=i: fired.append(("after", i)))
    for fraction, count in ((0.0, 0), (0.4, 1), (0.67, 2), (1.0, 3)):
        recompute(model, fraction, policy)
        assert [b.recompute for b in model.blocks] == [policy] * count + ["none"] * (3 - count)
        fired.clear()
        again = gradients(model, tokens, segments)
        assert all(torch.equal(again[n], plain[n]) for n in plain)
        assert fired == [(when, i) for i in range(3) for when in ("before", "after")]


def test_the_fraction_is_of_the_layers():
    model = Transformer(replace(CFG, num_layers=10), device="meta")
    for f, count in ((0.7, 7), (0.3, 3), (0.29, 2), (0.99, 9)):
        recompute(model, f)
        assert sum(b.recompute == "full" for b in model.blocks) == count


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_a_step_runs_on_fake_tensors(variant, policy):
    "Which also proves that nothing is read back from the device: a fake tensor has no value to read"
    with FakeTensorMode():
        model = Transformer(VARIANTS[variant])
        if policy != "none":
            recompute(model, 1.0, policy)
        tokens = torch.zeros(20, dtype=torch.int64)
        out = model(tokens, Segments.from_lengths([7, 1, 12]), labels=tokens)
        out.loss_sum.backward()
        assert out.token_loss.shape == (20,) and all(p.grad is not None for p in model.parameters())
    meta = Transformer(VARIANTS[variant], device="meta")
    tokens = torch.zeros(20, dtype=torch.int64, device="meta")
    assert meta(tokens, Segments.from_lengths([7, 13], "meta")).shape == (20, 61)


def test_initialisation_is_of_seed_name_and_index():
    "Same bits whatever came before, on a meta model filled later, in another type; the global generator is not touched"
    before = torch.get_rng_state()
    a = Transformer(CFG)
    assert torch.equal(before, torch.get_rng_state())
    torch.randn(3)
    b, c = allocate(Transformer(CFG, device="meta"), "cpu"), Transformer(CFG, dtype=torch.bfloat16)
    init_weights(b, 0)
    other = Transformer(CFG)
    init_weights(other, 1)
    for (name, p), q, r, s in zip(a.named_parameters(), b.parameters(), c.parameters(), other.parameters()):
        assert torch.equal(p, q) and torch.equal(p.bfloat16(), r), name
        assert torch.equal(p, s) == name.endswith("norm.weight"), name
    with_bias = Transformer(VARIANTS["internlm"])
    assert all(not p.any() for n, p in with_bias.named_parameters() if n.endswith("bias"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(0, 3 * BLOCK), max_size=5), name=st.sampled_from(["a", "b"]), seed=st.integers(0, 2**40)
)
def test_slices_join(cuts, name, seed):
    "However a parameter is cut, the parts are the whole"
    edges = [0, *sorted(cuts), 3 * BLOCK]
    parts = [normal_slice(seed, name, a, b, 0.5) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), normal_slice(seed, name, 0, 3 * BLOCK, 0.5))


def test_first_numbers_are_fixed():
    "The definition of every model's start: changing it would change every run"
    first = normal_slice(0, "embedding.weight", 0, 4, 1.0)
    assert torch.allclose(first, torch.tensor(FIRST), atol=1e-5), first.tolist()


FIRST = [0.133544, 0.643224, 0.384168, 1.446298]


@pytest.mark.parametrize(
    "dtype,tol", [(torch.float64, 1e-14), (torch.float32, 4 * 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_rms_norm_equals_its_formula(dtype, tol):
    "To the last place of the type, relative to each element"
    norm = RMSNorm(96, 1e-5, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(normal_slice(0, "norm", 0, 96, 1.0))
    x = (normal_slice(0, "x", 0, 20 * 96, 3.0).view(20, 96)).to(dtype)
    got, want = norm(x), rms_norm(x, norm.weight, 1e-5)
    assert got.dtype == dtype and ((got - want).abs() <= tol * want.abs()).all()


def test_flops_of_parts():
    "A step's count is the sum over its documents, and grows with what is recomputed"
    whole = step_flops(CFG, [8, 8, 16], 16)
    parts = [step_flops(CFG, [n], 16) for n in (8, 8, 16)]
    for field in whole._fields:
        assert abs(getattr(whole, field) - sum(getattr(p, field) for p in parts)) < 1e-6 * getattr(whole, field)
    counts = [step_flops(CFG, [16], 16, f).hardware for f in (0, 0.4, 0.7, 1.0)]
    assert (
        counts == sorted(counts)
        and counts[0] == step_flops(CFG, [16], 16, 1.0, "selective").hardware == whole.model / 2
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 0.7]),
    variant=st.sampled_from(sorted(VARIANTS)),
)
def test_generation_is_by_sequence(lengths, temperature, variant):
    "Streaming equals collecting; a first row does not depend on who shares its batch"
    model = Transformer(VARIANTS[variant], dtype=torch.float64)
    prompts = [ids(n, seed).tolist() for seed, n in enumerate(lengths)]
    how = Sampling(temperature=temperature, top_k=20, top_p=0.9, seed=5)
    texts = generate(model, prompts, 6, how, stop_ids=[7])
    assert texts[0] == generate(model, prompts[:1], 6, how, stop_ids=[7])[0]
    collected = [[] for _ in prompts]
    for step in stream(model, prompts, 6, how, stop_ids=[7]):
        for row, token in step.items():
            collected[row].append(token)
    assert collected == texts and all(7 not in t and len(t) <= 6 for t in texts)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["internlm2", "internlm"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_block_compiles(variant, backend):
    cfg = VARIANTS[variant]
    block = Transformer(cfg).blocks[0]
    block.attention.backend = backend
    segments = Segments.from_lengths([6, 6])
    positions: Positions = Inputs.of(cfg, ids(12), segments).positions(cfg)
    x = normal_slice(0, "x", 0, 12 * 32, 1.0).view(12, 32).requires_grad_()
    want = block(x, positions)
    want_grads = torch.autograd.grad(want.square().sum(), [x, *block.parameters()])
    got = torch.compile(block, fullgraph=True)(x, positions)
    got_grads = torch.autograd.grad(got.square().sum(), [x, *block.parameters()])
    assert torch.allclose(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
    for a, b in zip(got_grads, want_grads):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.slow
def test_the_whole_model_compiles():
    "Embedding to loss in one graph, recomputation included"
    model, tokens, segments = Transformer(CFG), ids(20), Segments.from_lengths([13, 7])
    want = {n: g.clone() for n, g in gradients(model, tokens, segments).items()}
    recompute(model, 0.5)
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    compiled(tokens, segments, labels=tokens.roll(-1)).loss_sum.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, want[name], rtol=0, atol=1e-5 * want[name].abs().max().item()), name

"Chunked linear cross entropy equals F.cross_entropy and never holds whole logits"

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_nb.base.check import IGNORE_INDEX
from internlm_nb.model.loss import cross_entropy_reference, linear_cross_entropy


def inputs(tokens, vocab, hidden=8, dtype=torch.float64, seed=0, ignored=0.3):
    g = torch.Generator().manual_seed(seed)
    x, w = (
        torch.randn(n, hidden, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n in (tokens, vocab)
    )
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    return x, w, labels.where(torch.rand(tokens, generator=g) >= ignored, IGNORE_INDEX)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40), vocab=st.integers(2, 30), chunk=st.integers(1, 50), smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]), scale=st.floats(0.01, 100), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_cross_entropy_in_float64(tokens, vocab, chunk, smoothing, ignored, scale, seed):
    x, w, labels = inputs(tokens, vocab, seed=seed, ignored=ignored)
    want = F.cross_entropy(x @ w.T, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing)
    out, plain = (
        linear_cross_entropy(x, w, labels, smoothing, chunk),
        cross_entropy_reference(x @ w.T, labels, smoothing),
    )
    assert torch.allclose(out.loss_sum, want, rtol=1e-12, atol=1e-12) and torch.equal(plain.loss_sum, want)
    assert torch.allclose(out.token_loss, plain.token_loss, rtol=1e-12, atol=1e-12) and torch.equal(
        out.correct, plain.correct
    )
    assert (out.token_loss[labels == IGNORE_INDEX] == 0).all() and not out.correct[labels == IGNORE_INDEX].any()
    for a, b in zip(torch.autograd.grad(out.loss_sum * scale, (x, w)), torch.autograd.grad(want * scale, (x, w))):
        assert torch.allclose(a, b, rtol=0, atol=1e-13 * max(1.0, b.abs().max().item()) * tokens)


def test_gradcheck():
    x, w, labels = inputs(7, 5)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels, 0.1, 3).loss_sum, (x, w))


@pytest.mark.parametrize(
    "dtype,unit", [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
def test_narrow_types(dtype, unit):
    "Softmax is in float32 whatever the weights: losses and gradients are as exact as the rounded logits"
    x, w, labels = inputs(300, 500, 64, dtype, ignored=0.1)
    w = (w.detach() / 8).requires_grad_()  # logits of order 1, as in training
    out = linear_cross_entropy(x, w, labels, chunk=128)
    assert out.loss_sum.dtype == out.token_loss.dtype == torch.float32
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
    want = cross_entropy_reference(exact_x @ exact_w.T, labels)
    # a logit is a rounded number: off by at most its size times the unit; a loss is the difference of two such
    largest = (exact_x @ exact_w.T).abs().max().item()
    assert (out.token_loss - want.token_loss).abs().max() < 2 * largest * max(unit, 4 * 2.0**-24)
    grads, exact = torch.autograd.grad(out.loss_sum, (x, w)), torch.autograd.grad(want.loss_sum, (exact_x, exact_w))
    for a, b in zip(grads, exact):
        assert a.dtype == dtype
        # a probability is off by its logit's error, relatively; then it and the sums are rounded a few times
        assert (a.double() - b).abs().max() < (2 * largest + 8) * unit * b.abs().max()


def test_float16_small_probabilities_survive():
    "With 50 000 words a probability is below float16's normal range: the weight's gradient still is within 2 % (root mean square) of the exact one"
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 32, generator=g), 0.02 * torch.randn(50_000, 32, generator=g)
    labels = torch.randint(0, 50_000, (256,), generator=g)
    grads = []
    for dtype in (torch.float16, torch.float64):
        leaf_x, leaf_w = x.half().to(dtype).requires_grad_(), w.half().to(dtype).requires_grad_()
        (linear_cross_entropy(leaf_x, leaf_w, labels, chunk=64).loss_sum * 16.0).backward()
        grads.append((leaf_x.grad.double(), leaf_w.grad.double()))
    for a, b in zip(*grads):
        assert (a - b).square().mean().sqrt() < 0.02 * b.square().mean().sqrt()


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_logits_are_never_allocated(dtype):
    x, w, labels = inputs(256, 1000, 16, dtype)
    with Largest() as seen:
        linear_cross_entropy(x, w, labels, 0.1, chunk=32).loss_sum.backward()
    assert seen.elements == 32 * 1000


def test_without_gradients_none_are_computed():
    x, w, labels = inputs(64, 100, 16)
    with torch.no_grad(), Largest() as seen:
        out = linear_cross_entropy(x, w, labels, chunk=8)
    assert seen.elements == w.numel() and not out.loss_sum.requires_grad
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.extend([func] if "mm" in str(func) else [])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        linear_cross_entropy(x, w, labels, chunk=8)
    assert len(products) == 8  # one product a chunk
    with Products():
        linear_cross_entropy(x.detach(), w, labels, chunk=8).loss_sum.backward()
    assert len(products) == 8 + 16  # frozen inputs: logits and the weight's gradient
    with Products():
        linear_cross_entropy(x, w.detach(), labels, chunk=8).loss_sum.backward()
    assert len(products) == 8 + 16 + 16 and x.grad is not None


def test_only_the_sum_carries_a_gradient():
    out = linear_cross_entropy(*inputs(5, 4))
    assert out.loss_sum.requires_grad and not out.token_loss.requires_grad and not out.correct.requires_grad


@pytest.mark.parametrize("bad", [4, 1000, -1, -99])
def test_a_bad_label_is_named(bad):
    x, w, labels = inputs(5, 4)
    labels[3] = bad
    with pytest.raises(ValueError, match=f"label {bad} of token 3 is outside the vocabulary of 4"):
        linear_cross_entropy(x, w, labels)
    with pytest.raises(ValueError, match="give one label a token"):
        linear_cross_entropy(x, w, labels[:3])

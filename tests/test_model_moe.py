"Mixture of experts: the same as every expert on every token, as Mixtral's block, as a slow loop that fills queues"

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from internlm_nb.hub.keys import entries
from internlm_nb.model import moe as at
from internlm_nb.model.config import ModelConfig, num_params, preset
from internlm_nb.model.flops import linear_flops, step_flops
from internlm_nb.model.init import parameter_std
from internlm_nb.model.loss import ExtraLosses, LossOutput
from internlm_nb.model.moe import (
    MixtureOfExperts,
    aux_loss,
    capacity_of,
    experts_reference,
    position_in_expert,
    tokens_per_expert,
    top_k,
)
from internlm_nb.model.segments import Inputs, KVCache, Segments
from internlm_nb.model.transformer import Transformer, recompute

NEAR: dict = dict(rtol=0, atol=1e-11)  # sums of some hundred numbers around 1, in another order


def config(**changes) -> ModelConfig:
    base: dict = dict(
        family="llama", vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, mlp_ratio=1.0, multiple_of=8, init_std=0.2,
        num_experts=4, aux_loss_coef=0.5, z_loss_coef=0.1,
    )  # fmt: skip
    return ModelConfig(**{**base, **changes})


def filled(cfg: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> MixtureOfExperts:
    moe = MixtureOfExperts(cfg, 0, dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return moe


def tokens(cfg: ModelConfig, n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(n, cfg.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def positions_of(cfg: ModelConfig, n: int):
    return Inputs.of(cfg, torch.zeros(n, dtype=torch.int64), Segments.from_lengths([n])).positions(cfg, torch.float64)


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.autograd.grad((out * upstream).sum(), inputs)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(experts_per_token=1),
        dict(experts_per_token=4, num_shared_experts=2),
        dict(num_experts=7, experts_per_token=3),
        dict(num_experts=1, experts_per_token=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 37])
def test_every_expert_on_every_token_says_the_same(changes, n):
    cfg = config(**changes)
    moe, x = filled(cfg), tokens(cfg, n)
    have, want = moe(x), experts_reference(moe, x)
    torch.testing.assert_close(have, want, **NEAR)
    for a, b in zip(gradients(have, x, *moe.parameters()), gradients(want, x, *moe.parameters())):
        torch.testing.assert_close(a, b, **NEAR)


def test_experts_that_nobody_chose_get_zero_gradients():
    cfg = config(experts_per_token=1)
    moe, x = filled(cfg), tokens(cfg, 20)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[2] = x.mean(0) * 100
        moe.gate.weight[1] = -moe.gate.weight[2]  # all tokens to 1 or 2
    for g in gradients(moe(x), *moe.experts.parameters()):
        assert not g[[0, 3]].any() and g[[1, 2]].any()


def test_experts_without_a_single_row():
    "A rank of whose experts no token wants one still has gradients to reduce: zeros"
    experts = filled(config()).experts
    x = torch.empty(0, 32, dtype=torch.float64, requires_grad=True)
    out = experts(x, torch.zeros(4, dtype=torch.int64))
    assert out.shape == (0, 32)
    for g, p in zip(torch.autograd.grad(out.sum(), [*experts.parameters()]), experts.parameters()):
        assert g.shape == p.shape and not g.any()


def test_mixtral_says_the_same():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    cfg = config()
    moe = filled(cfg, torch.float32)
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=cfg.ffn_size,
            num_local_experts=4,
            num_experts_per_tok=2,
            router_jitter_noise=0.0,
            experts_implementation="eager",
        )
    )
    with torch.no_grad():
        theirs.gate.weight.copy_(moe.gate.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat((moe.experts.w1, moe.experts.w3), 1))
        theirs.experts.down_proj.copy_(moe.experts.w2)
    x = tokens(cfg, 50, dtype=torch.float32).detach().requires_grad_()
    have, want = moe(x), theirs(x[None])[0]
    near: dict = dict(rtol=1e-5, atol=2e-5)  # float32, numbers up to 10
    torch.testing.assert_close(have, want, **near)
    upstream = torch.randn(have.shape)
    mine = torch.autograd.grad(
        (have * upstream).sum(), [x, moe.gate.weight, moe.experts.w1, moe.experts.w3, moe.experts.w2]
    )
    other = torch.autograd.grad(
        (want * upstream).sum(), [x, theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj]
    )
    for a, b in zip(mine, (*other[:2], *other[2].chunk(2, 1), other[3])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    # their balance loss counts each of the k choices as a whole: k times ours
    logits = F.linear(x, moe.gate.weight)
    probs, _, choices = top_k(logits, 2)
    ours = (
        aux_loss(replace(cfg, aux_loss_coef=1.0, z_loss_coef=0.0), logits, probs, tokens_per_expert(choices, 4), 50)
        / 50
    )
    torch.testing.assert_close(2 * ours, load_balancing_loss_func((logits,), 4, 2), rtol=1e-6, atol=0)


def slow_extra(cfg: ModelConfig, logits: Tensor) -> Tensor:
    "Both losses of a pack, a token at a time"
    probs = logits.softmax(-1)
    count = [0] * cfg.num_experts
    for row in probs.tolist():
        for e in sorted(range(cfg.num_experts), key=lambda e: -row[e])[: cfg.experts_per_token]:
            count[e] += 1
    balance = (
        sum(n * probs[:, e].mean() for e, n in enumerate(count))
        * cfg.num_experts
        / (len(logits) * cfg.experts_per_token)
    )
    z = torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean()
    return (cfg.aux_loss_coef * balance + cfg.z_loss_coef * z) * len(logits)


def test_extra_losses_are_the_formulas():
    cfg = config(num_experts=5, experts_per_token=3)
    logits = torch.randn(31, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    probs, weights, choices = top_k(logits, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(31, dtype=torch.float64))
    have = aux_loss(cfg, logits, probs, tokens_per_expert(choices, 5), 31)
    want = slow_extra(cfg, logits)
    torch.testing.assert_close(have, want, **NEAR)
    torch.testing.assert_close(*(torch.autograd.grad(t, logits)[0] for t in (have, want)), **NEAR)
    even = torch.eye(4, dtype=torch.float64).repeat(
        5, 1
    )  # each expert chosen equally often and equally likely: the balance loss is 1
    probs, _, choices = top_k(even, 1)
    one = aux_loss(
        config(experts_per_token=1, aux_loss_coef=1.0, z_loss_coef=0.0), even, probs, tokens_per_expert(choices, 4), 20
    )
    torch.testing.assert_close(one / 20, torch.tensor(1.0, dtype=torch.float64))


def slow_capacity(moe: MixtureOfExperts, x: Tensor) -> tuple[Tensor, int]:
    "Token after token, each to its experts as long as they have room; and how often there was none"
    cfg, dropped, out = moe.cfg, 0, []
    left = [capacity_of(cfg, len(x))] * cfg.num_experts
    _, weights, choices = top_k(F.linear(x, moe.gate.weight), cfg.experts_per_token)
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for weight, e in zip(weights[t], choices[t].tolist()):
            if left[e]:
                left[e] -= 1
                w1, w2, w3 = (w[e] for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
                row = row + weight * (w2 @ (F.silu(w1 @ x[t]) * (w3 @ x[t])))
            else:
                dropped += 1
        out.append(row if moe.shared is None else row + moe.shared(x[t : t + 1])[0])
    return torch.stack(out), dropped


@pytest.mark.parametrize(
    "factor, changes", [(0.3, {}), (1.0, dict(experts_per_token=3)), (0.7, dict(num_shared_experts=1)), (100.0, {})]
)
def test_capacity_drops_as_a_slow_loop_does(factor, changes):
    cfg = config(capacity_factor=factor, **changes)
    moe, x = filled(cfg), tokens(cfg, 41)
    positions = positions_of(cfg, 41)
    have, (want, dropped) = moe(x, positions), slow_capacity(moe, x)
    torch.testing.assert_close(have, want, **NEAR)
    for a, b in zip(gradients(have, x, *moe.parameters()), gradients(want, x, *moe.parameters())):
        torch.testing.assert_close(a, b, **NEAR)
    assert (
        positions.extra is not None
        and positions.extra.dropped[0].item() == dropped
        and (dropped == 0) == (factor == 100.0)
    )
    # outside of training, and with a cache, all tokens are served
    torch.testing.assert_close(moe.eval()(x), experts_reference(moe, x), **NEAR)
    cached = replace(positions, key_segments=positions.segments, extra=None)
    torch.testing.assert_close(moe.train()(x, cached), experts_reference(moe, x), **NEAR)


def test_places_in_queues():
    choices = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    assert position_in_expert(choices, 3).tolist() == [[0, 0], [1, 0], [1, 1], [2, 2]]
    keep = torch.tensor([[True, False], [True, True], [True, True], [True, True]])
    assert position_in_expert(choices, 3, keep).tolist() == [[0, 0], [0, 0], [1, 1], [1, 2]]


def total(model: Transformer, ids: Tensor, labels: Tensor) -> tuple[Tensor, LossOutput]:
    out = model(ids, Segments.from_lengths([9, 1, 14]), labels=labels)
    assert isinstance(out, LossOutput) and out.extra_sum is not None
    return out.loss_sum + out.extra_sum, out


@pytest.mark.parametrize("factor", [0.0, 0.7])
def test_extra_losses_reach_the_loss_once_when_recomputed(factor):
    cfg = config(capacity_factor=factor, num_shared_experts=1)
    model = Transformer(cfg, dtype=torch.float64)
    ids, labels = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0)).unbind(0)
    seen: list[Tensor] = []
    hooks = [
        block.feed_forward.gate.register_forward_hook(lambda m, a, out: seen.append(out)) for block in model.blocks
    ]  # type: ignore[union-attr]
    loss, out = total(model, ids, labels)
    assert out.extra_sum is not None and out.expert_tokens is not None and out.expert_dropped is not None
    want = torch.stack([slow_extra(cfg, logits) for logits in seen]).sum()
    torch.testing.assert_close(out.extra_sum, want, **NEAR)
    assert (
        out.expert_tokens.shape == (2, 4)
        and out.expert_tokens.sum(1).tolist() == [48, 48]
        and out.expert_dropped.shape == (2,)
    )
    for hook in hooks:
        hook.remove()
    params = list(model.parameters())
    grads = torch.autograd.grad(loss, params)
    gate = torch.autograd.grad(total(model, ids, labels)[1].extra_sum, model.blocks[0].feed_forward.gate.weight)[0]  # type: ignore[arg-type]
    assert gate.abs().max() > 1e-3  # the losses of the first block alone have a gradient that could be lost
    for policy in ("full", "selective"):
        recompute(model, 1.0, policy)
        loss, again = total(model, ids, labels)
        assert again.extra_sum is not None and torch.equal(again.extra_sum, out.extra_sum)
        for a, b in zip(torch.autograd.grad(loss, params), grads):
            torch.testing.assert_close(a, b, **NEAR)


def test_a_recomputation_leaves_nothing_behind():
    extra = ExtraLosses()
    first, second = torch.ones(()), torch.ones(()) * 2
    for term in (first, second):
        extra.add(3, term, torch.zeros(4, dtype=torch.int64), torch.zeros((), dtype=torch.int64))
    assert extra.terms[3] is first
    out = LossOutput(torch.ones(()), torch.ones(1), torch.ones(1, dtype=torch.bool))
    assert ExtraLosses().total() is None and ExtraLosses().put_into(out) is out


def test_dense_models_know_nothing_of_it():
    cfg = config(num_experts=0)
    out = Transformer(cfg)(torch.arange(5), labels=torch.arange(5))
    assert isinstance(out, LossOutput) and out.extra_sum is None and out.expert_tokens is None
    assert positions_of(cfg, 3).extra is None


def test_no_coefficients_no_losses():
    cfg = config(aux_loss_coef=0.0, z_loss_coef=0.0)
    out = Transformer(cfg)(torch.arange(5), labels=torch.arange(5))
    assert isinstance(out, LossOutput) and out.extra_sum is None and out.expert_tokens is not None


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_a_cache_gives_what_the_whole_gives(factor):
    cfg = config(capacity_factor=factor)
    model = Transformer(cfg, dtype=torch.float64).eval()
    ids = torch.randint(64, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, cache, got = model(ids), KVCache.empty(1), []
        for part in ids.split([7, 1, 1, 8, 1, 1, 1]):
            got.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(got), want, **NEAR)  # type: ignore[arg-type]


def test_first_values():
    cfg = config(init_std=0.1, num_shared_experts=1)
    assert (
        parameter_std(cfg, "blocks.7.feed_forward.experts.w1")
        == parameter_std(cfg, "blocks.7.feed_forward.gate.weight")
        == parameter_std(cfg, "blocks.7.feed_forward.shared.w3.weight")
        == 0.1
    )
    assert (
        parameter_std(cfg, "blocks.7.feed_forward.experts.w2")
        == parameter_std(cfg, "blocks.7.feed_forward.shared.w2.weight")
        == 0.1 / 4
    )
    for wrong in (
        "blocks.7.feed_forward.experts.w4",
        "blocks.7.feed_forward.gates.weight",
        "blocks.7.feed_forward.experts.w1.bias2",
    ):
        with pytest.raises(ValueError, match="no rule of initialisation"):
            parameter_std(cfg, wrong)


def test_counts():
    cfg = preset("internlm-7b-moe4")
    expert = 3 * 4096 * 5632
    assert num_params(cfg) - num_params(cfg, active=True) == 32 * 2 * expert
    dense = replace(cfg, num_experts=0)
    assert num_params(cfg) == num_params(dense) + 32 * (3 * expert + 4 * 4096)
    assert num_params(dense) == num_params(dense, active=True)
    assert linear_flops(cfg)[0] == linear_flops(dense)[0] + 2 * (expert + 4 * 4096)


@pytest.mark.parametrize("policy, shared", [("none", 1), ("full", 0), ("full", 1)])
def test_flops_are_those_of_the_products(policy, shared):
    cfg = config(num_shared_experts=shared)
    model = Transformer(cfg)
    recompute(model, 0.0 if policy == "none" else 1.0, "full")
    for block in model.blocks:
        block.attention.backend = "reference"  # type: ignore[union-attr]
    ids = torch.arange(24)
    with FlopCounterMode(display=False) as counter:
        out = model(ids, labels=ids)
        assert isinstance(out, LossOutput) and out.extra_sum is not None
        (out.loss_sum + out.extra_sum).backward()
    count = step_flops(cfg, [24], 24, 0.0 if policy == "none" else 1.0)
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    scores = 3 * cfg.num_layers * 4 * 24 * 24 * cfg.hidden_size
    again = cfg.num_layers * 4 * 24 * 24 * cfg.hidden_size if policy == "full" else 0
    assert products == count.hardware - scores - again


def test_nothing_is_exported_wrongly():
    for layout in ("llama", "internlm", "internlm2", "internlm3"):
        with pytest.raises(ValueError, match="num_experts is 4: models with experts have no layout outside"):
            entries(config(), layout)


def test_grouped_products(monkeypatch):
    "The grouped kernel, where it exists for a CPU, against the loop"
    cfg = config(hidden_size=32, intermediate_size=16)
    moe, x = filled(cfg, torch.bfloat16), tokens(cfg, 30, dtype=torch.bfloat16)
    assert at.why_not_grouped("cpu", torch.bfloat16, 32, 16) == "grouped products run on CUDA devices, not cpu"
    results = []
    for grouped in (False, True):
        if grouped:
            monkeypatch.setattr(at, "why_not_grouped", lambda *a: None)
            monkeypatch.setattr(at, "host_sizes", lambda *a: pytest.fail("the host waited"))
        for factor in (0.0, 0.8):
            moe.cfg = replace(cfg, capacity_factor=factor)
            x = x.detach().requires_grad_()
            out = moe(x)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), [x, *moe.parameters()])))
    for a, b in zip(results[:2], results[2:]):
        for p, q in zip(a, b):
            torch.testing.assert_close(
                p, q, rtol=2e-2, atol=2e-2 * q.abs().max().item()
            )  # bf16 rounds at 2^-9, here some products after another

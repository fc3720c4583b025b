import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from internlm_nb.model.config import ModelConfig
from internlm_nb.model.decode import thin_linear
from internlm_nb.model.layers import FeedForward
from internlm_nb.model.nodes import wide_dtype
from internlm_nb.model.segments import Positions


class _WideProduct(torch.autograd.Function):
    "x @ weight.T in float32 or float64, which keeps x in its own type"

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = wide_dtype(x.dtype)
        return x.to(wide) @ weight.to(wide).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0]
        of_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        return of_x, (grad.T @ x.to(grad.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None


class Gate(nn.Module):
    "A score for each expert, (experts, hidden)"

    def __init__(
        self,
        hidden_size: int,  # width of the residual stream
        experts: int,  # how many
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:  # (tokens, hidden) -> (tokens, experts) float32 or float64
        "Logits, in wide arithmetic: two experts' scores may be close, and bf16 would toss a coin"
        out = _WideProduct.apply(x, self.weight)
        assert isinstance(out, Tensor)
        return out


def choose(
    logits: Tensor,  # (tokens, experts), of the gate
    count: int,  # experts a token goes to
) -> tuple[Tensor, Tensor, Tensor]:  # probabilities (tokens, experts); weights (tokens, count), sums 1; choices (tokens, count) int64, the likeliest first
    "Softmax over all experts, the likeliest few, their probabilities divided by their sum: so do InternLM's gate (GShard's) and Mixtral's"
    probs = logits.softmax(-1)
    top, choices = probs.topk(count, dim=-1)
    return probs, top / top.sum(-1, keepdim=True), choices


def chosen(
    choices: Tensor,  # (tokens, count) int64
    experts: int,  # how many there are
) -> Tensor:  # (experts,) int64, on the device
    "How many tokens chose each expert"
    flat = choices.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def places(
    choices: Tensor,  # (tokens, count) int64, tokens in the order in which they are served
    experts: int,  # how many there are
    keep: Tensor | None = None,  # (tokens, count) bool, choices that queue at all; None: all
) -> Tensor:  # (tokens, count) int64
    "Each choice's place in its expert's queue, from 0: how many earlier tokens chose the same"
    ones = torch.ones_like(choices) if keep is None else keep.long()
    asked = choices.new_zeros(choices.shape[0], experts).scatter_(1, choices, ones)  # a token never chooses an expert twice
    return (asked.cumsum(0) - asked).gather(1, choices)


def capacity_of(
    cfg: ModelConfig,  # with a capacity factor above 0
    tokens: int,  # of the pack
) -> int:  # tokens
    "What an expert takes of a pack at most: so many times its even share, rounded up"
    return min(tokens, math.ceil(cfg.capacity_factor * tokens * cfg.experts_per_token / cfg.num_experts))


class Plan(NamedTuple):
    "Where each choice goes among rows that lie expert after expert"

    to: Tensor  # (tokens, count) int64; `rows` where dropped
    rows: int  # of all experts together
    sizes: Tensor | int  # rows of each expert: (experts,) int64; or one number for all, free ones zero
    kept: Tensor | None  # (tokens, count) bool; None: all


def plan_dropless(
    choices: Tensor,  # (tokens, count) int64
    counts: Tensor,  # (experts,) int64
) -> Plan:
    "Tokens sorted by expert, within it by position: a sort by counting, and the device alone knows where each expert begins"
    starts = counts.cumsum(0) - counts
    return Plan(starts[choices] + places(choices, counts.shape[0]), choices.numel(), counts, None)


def plan_capacity(
    choices: Tensor,  # (tokens, count) int64, of the tokens here
    kept: Tensor,  # (tokens, count) bool, which found room
    experts: int,  # how many there are
    slots: int,  # rows of each expert, at least as many as are kept
) -> Plan:
    "An equal number of rows for each expert, its tokens first: no size depends on the data"
    to = choices * slots + places(choices, experts, kept)
    return Plan(to.where(kept, experts * slots), experts * slots, slots, kept)


def _put(x: Tensor, to: Tensor, rows: int) -> Tensor:  # (tokens, count, hidden) -> (rows, hidden)
    out = x.new_zeros(rows + 1, x.shape[-1])  # the last row takes what is dropped
    for j in range(to.shape[1]):
        out.index_copy_(0, to[:, j], x[:, j])
    return out[:-1]


def _take(rows: Tensor, to: Tensor, kept: Tensor | None) -> Tensor:  # (rows, hidden) -> (tokens, count, hidden)
    if kept is None:
        return rows.index_select(0, to.flatten()).unflatten(0, to.shape)
    return rows.index_select(0, to.clamp(max=rows.shape[0] - 1).flatten()).unflatten(0, to.shape).masked_fill(~kept.unsqueeze(-1), 0.0)


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _put(x.unsqueeze(1).expand(-1, plan.to.shape[1], -1), plan.to, plan.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[reportIncompatibleMethodOverride]
        return _take(grads[0], ctx.plan.to, ctx.plan.kept).sum(1), None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _take(rows, plan.to, plan.kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[reportIncompatibleMethodOverride]
        return _put(grads[0], ctx.plan.to, ctx.plan.rows), None


def to_experts(
    x: Tensor,  # (tokens, hidden)
    plan: Plan,  # where each goes
) -> Tensor:  # (rows, hidden), expert after expert
    "A copy of each token for each expert it goes to. Backward: their gradients, added up in a fixed order"
    out = _Put.apply(x, plan)
    assert isinstance(out, Tensor)
    return out


def from_experts(
    rows: Tensor,  # (rows, hidden), expert after expert
    plan: Plan,  # where each token's are
) -> Tensor:  # (tokens, count, hidden), zeros where dropped
    "The results back at their tokens"
    out = _Take.apply(rows, plan)
    assert isinstance(out, Tensor)
    return out


def why_not_grouped(
    device: torch.device | str,  # where the experts are
    dtype: torch.dtype,  # of their weights
    *widths: int,  # of the products
) -> str | None:  # None: it can run
    "The reason why the experts' products are a loop, which on a GPU waits for the number of each expert's tokens"
    device = torch.device(device)
    if device.type != "cuda":
        return f"grouped products run on CUDA devices, not {device.type}"
    if dtype != torch.bfloat16:
        return f"grouped products are for bfloat16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped products need compute capability 8.0 (Ampere) or newer"
    if any(w % 8 for w in widths):
        return f"grouped products need widths divisible by 8, not {widths}"
    return None


def host_sizes(
    counts: Tensor,  # (groups,) int64, or several such rows
    rows: int,  # their sum
) -> list:  # of numbers, or of lists of them
    "The counts on the host, which waits for them on a GPU; under fake tensors, which know none, an even share"
    if counts.is_meta or isinstance(counts, FakeTensor):
        groups = counts.shape[-1]
        even = [rows // groups + (i < rows % groups) for i in range(groups)]
        return even if counts.dim() == 1 else [even] * counts.shape[0]
    return counts.tolist()


def grouped_linear(
    x: Tensor,  # (rows, in), group after group
    weight: Tensor,  # (groups, out, in)
    sizes: Tensor | list[int],  # rows of each group: int32 ends of the groups on the device; or the numbers on the host
) -> Tensor:  # (rows, out)
    "Each group of rows times its own matrix: one grouped kernel, or a loop"
    if isinstance(sizes, Tensor):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=sizes)
    return torch.cat([thin_linear(part, matrix) for part, matrix in zip(x.split(sizes), weight.unbind(0))])


class Experts(nn.Module):
    "SwiGLU networks side by side: w1 and w3 (experts, ffn, hidden), w2 (experts, hidden, ffn)"

    def __init__(
        self,
        experts: int,  # how many
        hidden_size: int,  # width of the residual stream
        ffn_size: int,  # width in between, of each
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, ffn_size, hidden_size, device=device, dtype=dtype))  # gate
        self.w2 = nn.Parameter(torch.empty(experts, hidden_size, ffn_size, device=device, dtype=dtype))  # down
        self.w3 = nn.Parameter(torch.empty(experts, ffn_size, hidden_size, device=device, dtype=dtype))  # up

    def forward(
        self,
        x: Tensor,  # (rows, hidden), expert after expert
        sizes: Tensor | int,  # rows of each expert: (experts,) int64 on the device; or one number for all
    ) -> Tensor:  # (rows, hidden)
        "Each expert on its rows"
        experts, ffn, hidden = self.w1.shape
        if why_not_grouped(x.device, x.dtype, hidden, ffn) is None:
            counts = torch.full((experts,), sizes, device=x.device) if isinstance(sizes, int) else sizes
            groups: Tensor | list[int] = counts.cumsum(0).to(torch.int32)
        else:
            groups = [sizes] * experts if isinstance(sizes, int) else host_sizes(sizes, x.shape[0])
        return grouped_linear(F.silu(grouped_linear(x, self.w1, groups)) * grouped_linear(x, self.w3, groups), self.w2, groups)

    def extra_repr(self) -> str:
        return f"experts={self.w1.shape[0]}, hidden={self.w1.shape[2]}, ffn={self.w1.shape[1]}"


def extra_term(
    cfg: ModelConfig,  # with the coefficients
    logits: Tensor,  # (tokens, experts), of the tokens here
    probs: Tensor,  # (tokens, experts), their softmax
    counts: Tensor,  # (experts,) int64, choices of the whole pack
    pack_tokens: int,  # of the whole pack
) -> Tensor:  # () float32 or float64
    """Balance and z-loss of a pack times its tokens, or what the tokens here add to it

    Balance: E/(T k) sum_e tokens_e mean_gate_e (Switch Transformer, section 2.2, over k choices), 1 when even. z-loss: mean(logsumexp(logits)^2) (ST-MoE, equation 5). Times T, both are sums over tokens.
    """
    share = counts.to(probs.dtype) * (cfg.num_experts / (pack_tokens * cfg.experts_per_token))  # 1 for each expert when even; has no gradient
    return cfg.aux_loss_coef * (probs.sum(0) * share).sum() + cfg.z_loss_coef * logits.logsumexp(-1).square().sum()


class MixtureOfExperts(nn.Module):
    "A feed-forward of many experts: a gate sends each token to a few, and adds up what they return by its weights"

    def __init__(
        self,
        cfg: ModelConfig,  # architecture
        layer: int,  # index of the block in the whole model
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.gate = Gate(cfg.hidden_size, cfg.num_experts, device, dtype)
        self.experts = Experts(cfg.num_experts, cfg.hidden_size, cfg.ffn_size, device, dtype)
        self.shared = FeedForward(cfg.hidden_size, cfg.num_shared_experts * cfg.ffn_size, device, dtype) if cfg.num_shared_experts else None

    pack_parts = 1  # ranks that have parts of one pack; more in parallel/expert.py

    def pack_counts(self, counts: Tensor) -> Tensor:  # (experts,) int64 of the tokens here -> of the whole pack
        "Choices of the whole pack: all of it is here"
        return counts

    def pack_places(self, choices: Tensor, order: Tensor | None) -> Tensor:  # both of the tokens here; (tokens, count) int64
        "Places in the queues of the whole pack: all of it is here"
        return places(choices, self.cfg.num_experts)

    def plan(
        self,
        choices: Tensor,  # (tokens, count) int64
        counts: Tensor,  # (experts,) int64
        positions: Positions | None,  # of this pass
    ) -> Plan:
        "Who goes where. Capacity counts in training only, and never with a cache: what a token becomes may then not depend on its neighbours"
        if not (self.cfg.capacity_factor and self.training and (positions is None or positions.key_segments is None)):
            return plan_dropless(choices, counts)
        capacity = capacity_of(self.cfg, choices.shape[0] * self.pack_parts)
        kept = self.pack_places(choices, None if positions is None else positions.order) < capacity
        return plan_capacity(choices, kept, self.cfg.num_experts, min(capacity, choices.shape[0]))

    def forward(
        self,
        x: Tensor,  # (tokens, hidden)
        positions: Positions | None = None,  # of this pass, where losses are collected
    ) -> Tensor:  # (tokens, hidden)
        "Each token's experts, weighed by the gate, and the shared one"
        logits = self.gate(x)
        probs, weights, choices = choose(logits, self.cfg.experts_per_token)
        counts = chosen(choices, self.cfg.num_experts)
        plan = self.plan(choices, counts, positions)
        if positions is not None and positions.extra is not None:
            self.report(logits, probs, counts, plan, positions)
        back = from_experts(self.experts(to_experts(x, plan), plan.sizes), plan)  # (tokens, count, hidden)
        out = (back * weights.to(x.dtype).unsqueeze(-1)).sum(1)
        return out if self.shared is None else out + self.shared(x)

    def report(self, logits: Tensor, probs: Tensor, counts: Tensor, plan: Plan, positions: Positions) -> None:
        "Leave the extra losses, and figures for the log, with the pass"
        assert positions.extra is not None
        term = None
        if self.cfg.aux_loss_coef or self.cfg.z_loss_coef:
            every = self.pack_counts(counts) if self.cfg.aux_loss_coef else counts
            term = self.share(extra_term(self.cfg, logits, probs, every, probs.shape[0] * self.pack_parts))
        dropped = torch.zeros((), dtype=torch.int64, device=counts.device) if plan.kept is None else (~plan.kept).sum()
        positions.extra.add(self.layer, term, counts, dropped)

    def share(self, term: Tensor) -> Tensor:
        "This rank's share of the gradient of a term that others compute too: all of it"
        return term


def experts_reference(
    moe: MixtureOfExperts,  # whose weights to take
    x: Tensor,  # (tokens, hidden)
) -> Tensor:  # (tokens, hidden)
    "Every expert on every token, and the weights of those not chosen zero; dropless"
    _, weights, choices = choose(F.linear(x.to(wide_dtype(x.dtype)), moe.gate.weight.to(wide_dtype(x.dtype))), moe.cfg.experts_per_token)
    every = torch.zeros(x.shape[0], moe.cfg.num_experts, dtype=weights.dtype, device=x.device).scatter(1, choices, weights).to(x.dtype)
    w1, w2, w3 = moe.experts.w1, moe.experts.w2, moe.experts.w3
    inner = F.silu(torch.einsum("th,efh->tef", x, w1)) * torch.einsum("th,efh->tef", x, w3)
    out = torch.einsum("tef,ehf,te->th", inner, w2, every)
    return out if moe.shared is None else out + moe.shared(x)

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from internlm_nb.model.config import ModelConfig, require
from internlm_nb.model.moe import Experts, MixtureOfExperts, Plan, capacity_of, from_experts, host_sizes, places, to_experts
from internlm_nb.model.segments import Positions
from internlm_nb.parallel.comm import Axis, all_gather, all_reduce, all_to_all
from internlm_nb.parallel.layout import Mode
from internlm_nb.parallel.mesh import Mesh
from internlm_nb.parallel.pairs import copy_to, gather_from_sequence, reduce_from, scatter_to_sequence
from internlm_nb.parallel.placement import Cut, Placement
from internlm_nb.parallel.record import Count


def regroup(
    received: Tensor,  # (ranks, experts) int64, rows by sender and by this rank's expert
    rows: int,  # their sum
) -> Tensor:  # (rows,) int64
    "Where each row goes when those that came sender by sender are to lie expert by expert"
    ranks, experts = received.shape
    begins = received.T.flatten().cumsum(0).view(experts, ranks).T - received  # of each (sender, expert) among rows by expert
    came = received.flatten()
    shift = begins.flatten() - (came.cumsum(0) - came)  # by how much each run of rows moves
    return torch.arange(rows, device=came.device) + shift.repeat_interleave(came, output_size=rows)


class SplitExperts(Experts):
    "A share of the experts, for the tokens of all ranks of the axis: rows go to where their expert lives, and come back"

    def __init__(
        self,
        old: Experts,  # whose parameters, cut already, it takes over
        axis: Axis,  # the expert axis
    ):
        nn.Module.__init__(self)
        self.w1, self.w2, self.w3, self.axis = old.w1, old.w2, old.w3, axis

    def forward(
        self,
        x: Tensor,  # (rows, hidden), expert after expert, of all experts
        sizes: Tensor | int,  # rows of each expert; one number: the same on every rank
    ) -> Tensor:  # (rows, hidden)
        "Dispatch, compute, combine. With equal sizes nothing waits; otherwise the host reads how many rows go where: the one place in a step where it waits for the device"
        return self.even(x, sizes) if isinstance(sizes, int) else self.uneven(x, sizes)

    def even(self, x: Tensor, slots: int) -> Tensor:  # (experts * slots, hidden), likewise out
        "Equally many rows for each expert"
        ranks, here = self.axis.size, self.w1.shape[0]
        came = all_to_all(x, self.axis, "dispatch").view(ranks, here, slots, -1)
        out = Experts.forward(self, came.transpose(0, 1).reshape(ranks * here * slots, -1), ranks * slots)
        return all_to_all(out.view(here, ranks, slots, -1).transpose(0, 1).reshape(ranks * here * slots, -1), self.axis, "combine")

    def uneven(self, x: Tensor, counts: Tensor) -> Tensor:  # (rows, hidden), likewise out
        "As many rows as chose it for each expert"
        ranks, here = self.axis.size, self.w1.shape[0]
        received = all_to_all(counts, self.axis, "expert counts").view(ranks, here)
        send, receive = host_sizes(torch.stack((counts.view(ranks, here).sum(1), received.sum(1))), x.shape[0])
        rows = sum(receive)
        to = regroup(received, rows)
        plan = Plan(to.unsqueeze(1), rows, received.sum(0), None)
        came = all_to_all(x, self.axis, "dispatch", send, receive)
        out = from_experts(Experts.forward(self, to_experts(came, plan), plan.sizes), plan).squeeze(1)
        return all_to_all(out, self.axis, "combine", receive, send)


class _Share(torch.autograd.Function):
    "The same number on several ranks, of whose gradient each takes an equal share"

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / ctx.size, None


class SplitMixture(MixtureOfExperts):
    "Experts cut over ranks: channels over tensor, experts over expert; the gate is whole everywhere, and counts are those of the whole pack"

    def __init__(
        self,
        old: MixtureOfExperts,  # whose parameters, cut already, it takes over
        tensor: Axis | None = None,  # over which channels are cut; None: they are not
        mode: Mode = "mtp",  # how activations lie between blocks
        pack: tuple[Axis, ...] = (),  # over which packs are cut: sequence, context
    ):
        nn.Module.__init__(self)
        self.cfg, self.layer, self.gate, self.experts, self.shared = old.cfg, old.layer, old.gate, old.experts, old.shared
        self.tensor, self.pack = tensor, tuple(axis for axis in pack if axis.size > 1)
        self.mode: Mode = mode
        for axis in self.pack:
            self.pack_parts *= axis.size

    def forward(
        self,
        x: Tensor,  # (tokens, hidden), in msp and fsp this rank's (tokens / size, hidden); likewise out
        positions: Positions | None = None,  # of the tokens that all tensor ranks have together
    ) -> Tensor:
        "One exchange over tensor in, one out; in between each rank's channels of the experts say something of all tokens. fsp keeps what msp keeps: the experts have copies of the tokens anyway"
        if self.tensor is None:
            return super().forward(x, positions)
        x = (copy_to if self.mode == "mtp" else gather_from_sequence)(x, self.tensor, "ffn in")
        return (reduce_from if self.mode == "mtp" else scatter_to_sequence)(super().forward(x, positions), self.tensor, "ffn out")

    def pack_counts(self, counts: Tensor) -> Tensor:
        "Choices of the whole pack: added up"
        for axis in self.pack:
            counts = all_reduce(counts, axis, "expert balance")
        return counts

    def pack_places(self, choices: Tensor, order: Tensor | None) -> Tensor:
        "Places in the queues of the whole pack: every rank sees all choices in the pack's order. Raises ValueError when nobody says which tokens are here"
        if not self.pack:
            return super().pack_places(choices, order)
        if order is None or order.shape != choices.shape[:1]:
            raise ValueError(f"capacity goes by a token's place in its pack, of which this rank has a part: give Positions.order, {choices.shape[0]} places (int64) for the tokens here")
        both = torch.cat((order.unsqueeze(1), choices), 1)
        for axis in self.pack:
            both = all_gather(both, axis, "expert places")
        whole = torch.empty_like(both[:, 1:])
        whole[both[:, 0]] = both[:, 1:]
        return places(whole, self.cfg.num_experts)[order]

    def share(self, term: Tensor) -> Tensor:
        "All tensor ranks compute the same term: its gradient counts once"
        return term if self.tensor is None else _Share.apply(term, self.tensor.size)  # type: ignore[return-value]


def expert_parallel(
    model: nn.Module,  # a Transformer, cut over tensor already where that is wanted, best on the meta device; changed in place
    mesh: Mesh,  # with the axes expert, sequence, context
    placements: dict[str, Placement],  # of every parameter, as they are so far
) -> dict[str, Placement]:  # as they are now
    """Give each rank of the expert axis its share of every block's experts. Raises ValueError when they cannot be shared out evenly. A model without experts stays as it is

    GShard (Lepikhin et al. 2020), section 3.
    """
    cfg: ModelConfig = model.cfg  # type: ignore[assignment]
    axis, pack = mesh.axis("expert"), (mesh.axis("sequence"), mesh.axis("context"))
    require(cfg.num_experts > 0 or axis.size == 1, f"expert is {axis.size}, but the model has no experts: write expert 1")
    if not cfg.num_experts:
        return placements
    require(cfg.num_experts % axis.size == 0, f"num_experts {cfg.num_experts} is not divisible by expert {axis.size}: make expert a divisor of {cfg.num_experts}")
    out = dict(placements)
    for name, parameter in list(model.named_parameters()) if axis.size > 1 else []:
        dim = 0 if ".experts." in name else None
        out[name] = replace(placements[name], more=(*placements[name].more, Cut("expert", dim, axis.coord, axis.size)))
        if dim is not None:
            part = parameter.detach().chunk(axis.size)[axis.coord].clone(memory_format=torch.contiguous_format)
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Parameter(part, parameter.requires_grad))
    for block in model.blocks:  # type: ignore[union-attr]
        old = block.feed_forward
        tensor, mode = (old.tensor, old.mode) if isinstance(old, SplitMixture) else (None, "mtp")
        if axis.size > 1:
            old.experts = SplitExperts(old.experts, axis)
        if axis.size > 1 or tensor is not None or any(a.size > 1 for a in pack):
            block.feed_forward = SplitMixture(old, tensor, mode, pack)
    return out


def dispatch_bytes(
    cfg: ModelConfig,  # architecture
    rows: int,  # that this rank sends off in one block: tokens of its pack times experts_per_token, or all slots
    away: int,  # of them, those whose expert is on another rank
    size: int,  # expert ranks
    itemsize: int = 2,  # bytes of an activation: 2 for bf16
    back: tuple[int, int] | None = None,  # rows that came, and of them those from other ranks; None: as many as were sent
    recomputed: int = 0,  # of the blocks
    counts: bool = True,  # are they uneven, so that numbers travel too?
    blocks: int = 1,  # that these rows are of
) -> dict[str, Count]:  # by purpose
    "What one rank sends over the expert axis for one pack, forward and backward"
    width, (came, far) = cfg.hidden_size * itemsize, (rows, away) if back is None else back
    sent, returned = (rows * width, away * width), (came * width, far * width)
    out = {"expert counts": Count(blocks + recomputed, 0, 0)} if counts else {}
    for count in out.values():
        count.payload_bytes = count.calls * cfg.num_experts * 8
        count.sent_bytes = count.payload_bytes * (size - 1) // size
    for purpose, (payload, leaving), calls in (
        ("dispatch", sent, blocks + recomputed),
        ("combine", returned, blocks + recomputed),
        ("dispatch backward", returned, blocks),
        ("combine backward", sent, blocks),
    ):
        out[purpose] = Count(calls, calls * payload, calls * leaving)
    return out if size > 1 else {}


def slot_rows(
    cfg: ModelConfig,  # with a capacity factor above 0
    tokens: int,  # of a pack, on this rank
    parts: int = 1,  # ranks that have parts of one pack
) -> int:  # rows
    "Rows that leave for the experts with a capacity, of every block: the same whatever the gate says"
    return cfg.num_experts * min(tokens, capacity_of(cfg, tokens * parts))

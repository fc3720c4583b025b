"Experts over ranks are the same computation, send what the closed form says, and are saved once"

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.data.loader import DataConfig
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.init import allocate, init_weights
from internlm_nb.model.loss import ExtraLosses, LossOutput
from internlm_nb.model.moe import MixtureOfExperts
from internlm_nb.model.segments import Inputs, Segments
from internlm_nb.model.transformer import Transformer, recompute
from internlm_nb.parallel.axis import Axis
from internlm_nb.parallel.comm import all_gather, all_reduce
from internlm_nb.parallel.expert import SplitExperts, SplitMixture, expert_parallel, regroup, slot_rows
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.mesh import Mesh, Place, destroy, init_distributed, make_mesh, single
from internlm_nb.parallel.placement import Cut, Placement, init_placed, placements_of
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.parallel.record import Recorder
from internlm_nb.parallel.tensor import tensor_parallel
from internlm_nb.parallel.traffic import by_purpose, expert_traffic, tensor_traffic
from internlm_nb.run.state import TrainState, load_run, save_run, state_chunks
from internlm_nb.train.config import RunConfig
from internlm_nb.train.optim import OptimConfig, Optimizer
from internlm_nb.train.parallelize import make_optimizer
from internlm_nb.train.precision import PRECISIONS
from internlm_nb.train.schedules import ScheduleConfig

LENGTHS = (7, 1, 12, 4)  # documents of a pack
TOKENS = sum(LENGTHS)
PACKS = 4  # of a step, over all data ranks
OPTIM = OptimConfig(lr=3e-4, clip=0.05, schedule=ScheduleConfig(kind="constant", warmup_ratio=0.0))


def config(**changes) -> ModelConfig:
    base: dict = dict(
        family="llama", vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, mlp_ratio=1.0, multiple_of=8, init_std=0.2,
        num_experts=4, aux_loss_coef=0.5, z_loss_coef=0.1,
    )  # fmt: skip
    return ModelConfig(**{**base, **changes})


def pack(cfg: ModelConfig, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(cfg.vocab_size, (TOKENS,), generator=g) for _ in range(2))
    labels[torch.rand(TOKENS, generator=g) < 0.2] = -100
    return ids, labels


def build(cfg: ModelConfig, mesh: Mesh, dtype: torch.dtype = torch.float64) -> tuple[Transformer, dict[str, Placement]]:
    model = Transformer(cfg, device="meta", dtype=dtype)
    placements = tensor_parallel(model, mesh.axis("tensor"), mesh.layout.mode)
    placements = expert_parallel(model, mesh, placements)
    allocate(model, "cpu")
    init_placed(model, placements, seed=3)
    return model.train(), placements  # type: ignore[return-value]


def forward(model: Transformer, cfg: ModelConfig, seed: int) -> LossOutput:
    ids, labels = pack(cfg, seed)
    out = model(ids, Segments.from_lengths(LENGTHS), labels=labels)
    assert isinstance(out, LossOutput) and out.extra_sum is not None
    return out


def whole_pieces(opt: Optimizer, tensors: list[Tensor]) -> dict[str, Tensor]:
    "Gradients or masters of one piece each, in the parameters' shapes: nothing is cut over replicas here"
    return {
        shard.name: t.detach().view(opt.engine.params[shard.name].shape).clone()
        for shard, t in zip(opt.engine.shards, tensors)
    }


def three_steps(mesh: Mesh, cfg: ModelConfig, policy: str = "none"):
    "Losses and norms of three steps, the first one's gradients, the last weights, placements"
    model, placements = build(cfg, mesh)
    recompute(model, 0.0 if policy == "none" else 1.0, "full" if policy == "none" else policy)  # type: ignore[arg-type]
    opt = make_optimizer(model, OPTIM, PRECISIONS["float64"], mesh, None, placements, bucket_mb=0.02)
    data, figures, first = mesh.axis("data"), [], {}
    for step in range(3):
        opt.set_schedule(step, 3)
        opt.zero_grad()
        total, seeds = torch.zeros((), dtype=torch.float64), range(data.coord, PACKS, data.size)
        for i, seed in enumerate(seeds):
            out = forward(model, cfg, 10 * step + seed)
            assert out.extra_sum is not None and out.expert_tokens is not None
            assert out.expert_tokens.sum(1).tolist() == [TOKENS * cfg.experts_per_token] * cfg.num_layers
            loss = (out.loss_sum + out.extra_sum) / (PACKS * TOKENS)
            if i == len(seeds) - 1:
                opt.last_micro_batch()
            loss.backward()
            total += loss.detach()
        info = opt.update()
        figures.append((all_reduce(total, data, "test").item(), info.grad_norm.item()))
        if step == 0:
            first = whole_pieces(opt, opt.collect())
    mesh.check_waited()
    return figures, first, whole_pieces(opt, [shard.master for shard in opt.engine.shards]), placements


def hold(layout: Layout, cfg: ModelConfig, policy: str = "none") -> None:
    figures, grads, weights, _ = three_steps(single(), cfg)
    for got, first, last, placements in run_ranks(three_steps, layout, cfg, policy, timeout=120):
        for (loss, norm), (loss1, norm1) in zip(figures, got):
            assert abs(loss1 - loss) <= 1e-12 * abs(loss) and abs(norm1 - norm) <= 1e-10 * norm, (
                loss,
                loss1,
                norm,
                norm1,
            )
        assert first.keys() == grads.keys() == placements.keys()
        for name, place in placements.items():
            # clipping scales all by the norm; gradients and weights are sums in another order: 1e-10 of the largest
            assert (first[name] - place.cut(grads[name])).abs().max() <= 1e-10 * grads[name].abs().max(), name
            assert (last[name] - place.cut(weights[name])).abs().max() <= 1e-10, name


CASES = {
    "ep2": (Layout(2, expert=2), {}, "none"),
    "ep2 capacity, shared": (Layout(2, expert=2), dict(capacity_factor=0.8, num_shared_experts=1), "full"),
    "ep2 tp2 mtp": (Layout(4, tensor=2, expert=2), dict(num_shared_experts=1), "selective"),
    "ep2 tp2 msp capacity": (Layout(4, tensor=2, expert=2, mode="msp"), dict(capacity_factor=1.0), "none"),
    "ep4": (Layout(4, expert=4), dict(experts_per_token=1), "none"),
}
MORE = {
    "tp2 fsp": (Layout(2, tensor=2, mode="fsp"), dict(num_shared_experts=2), "full"),
    "ep2 tp2 mtp capacity": (Layout(4, tensor=2, expert=2), dict(capacity_factor=0.5, num_shared_experts=1), "full"),
    "ep2 tp2 msp": (Layout(4, tensor=2, expert=2, mode="msp"), dict(num_shared_experts=1), "selective"),
    "ep2 tp2 fsp": (Layout(4, tensor=2, expert=2, mode="fsp"), {}, "none"),
    "ep2 dp": (Layout(4, expert=2), dict(experts_per_token=3), "none"),
    "ep4 capacity": (Layout(4, expert=4), dict(capacity_factor=2.0), "selective"),
    "ep1 dp2": (Layout(2), {}, "none"),
}


@pytest.mark.parametrize("case", CASES)
def test_any_layout_is_the_same_computation(case):
    layout, changes, policy = CASES[case]
    hold(layout, config(**changes), policy)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_layouts(case):
    layout, changes, policy = MORE[case]
    hold(layout, config(**changes), policy)


@pytest.mark.slow
def test_eight_ranks():
    hold(Layout(8, tensor=2, expert=2, mode="msp"), config(num_shared_experts=1))


# packs cut over sequence and context ranks


def zigzag(rank: int, context: int, sequence: int) -> Tensor:
    "Places of a rank's tokens: 2 x context chunks, of which it has one from each end; then a consecutive part of this list"
    c, s = rank // sequence, rank % sequence
    chunks = torch.arange(TOKENS).chunk(2 * context) if context > 1 else (torch.arange(TOKENS),)
    mine = torch.cat((chunks[c], chunks[2 * context - 1 - c])) if context > 1 else chunks[0]
    return mine.chunk(sequence)[s]


def part_of_a_pack(mesh: Mesh, cfg: ModelConfig):
    torch.manual_seed(0)
    whole = MixtureOfExperts(cfg, 0, dtype=torch.float64)
    with torch.no_grad():
        for p in whole.parameters():
            p.normal_(std=0.3)
    x, upstream = (
        torch.randn(TOKENS, cfg.hidden_size, dtype=torch.float64),
        torch.randn(TOKENS, cfg.hidden_size, dtype=torch.float64),
    )

    def run(moe: MixtureOfExperts, rows: Tensor, order: Tensor | None):
        inputs = Inputs.of(cfg, torch.zeros(len(rows), dtype=torch.int64), Segments.from_lengths([len(rows)]))
        positions = replace(inputs.positions(cfg, torch.float64), extra=ExtraLosses(), order=order)
        a = x[rows].clone().requires_grad_()
        out = moe(a, positions)
        assert positions.extra is not None
        term = positions.extra.total()
        assert term is not None and a.grad is None
        ((out * upstream[rows]).sum() + term).backward()
        assert a.grad is not None
        grads = [p.grad.clone() for p in moe.parameters() if p.grad is not None]
        for p in moe.parameters():
            p.grad = None
        return out.detach(), a.grad, term.detach(), positions.extra.dropped[0], grads

    want = run(whole, torch.arange(TOKENS), None)
    mine = zigzag(mesh.rank, mesh.layout.context, mesh.layout.sequence)
    pack_axes = mesh.axis("sequence"), mesh.axis("context")
    have = run(SplitMixture(whole, pack=pack_axes), mine, mine)
    near: dict = dict(rtol=0, atol=1e-11)
    torch.testing.assert_close(have[0], want[0][mine], **near)
    torch.testing.assert_close(have[1], want[1][mine], **near)
    summed = [have[2], have[3], *have[4]]
    for a, b in zip([all_reduce(t, mesh.axis("world"), "test") for t in summed], [want[2], want[3], *want[4]]):
        torch.testing.assert_close(a, b, **near)
    if cfg.capacity_factor:
        assert 0 < want[3] < TOKENS
        with pytest.raises(ValueError, match=r"give Positions\.order, "):
            SplitMixture(whole, pack=pack_axes)(x[mine])
    mesh.check_waited()


@pytest.mark.parametrize(
    "layout", [pytest.param(Layout(2, sequence=2), marks=pytest.mark.slow), Layout(4, sequence=2, context=2)]
)
def test_a_pack_on_several_ranks(layout):
    def both(mesh: Mesh) -> None:
        for factor in (0.0, 0.8):
            part_of_a_pack(mesh, config(capacity_factor=factor))

    run_ranks(both, layout)


# what is sent


def sends(mesh: Mesh) -> None:
    recorder = Recorder()
    for name in ("expert", "tensor"):
        object.__setattr__(mesh.axis(name), "recorder", recorder)
    axis = mesh.axis("expert")
    for factor, policy, dtype in (
        (0.0, "none", torch.float32),
        (0.0, "full", torch.float64),
        (0.9, "selective", torch.float32),
        (0.9, "none", torch.bfloat16),
    ):
        cfg = config(capacity_factor=factor)
        model, _ = build(cfg, mesh, dtype)
        recomputed = 0 if policy == "none" else cfg.num_layers
        recompute(model, recomputed / cfg.num_layers, "full" if policy == "none" else policy)  # type: ignore[arg-type]
        recorder.reset()
        out = forward(model, cfg, axis.coord)
        out.loss_sum.backward()
        over = {purpose: count for (name, purpose, _), count in recorder.counts.items() if name == "tensor"}
        counts = {purpose: count for (name, purpose, _), count in recorder.counts.items() if name == "expert"}
        closed: dict = {}
        if factor:
            rows = slot_rows(cfg, TOKENS)
            away = rows * (axis.size - 1) // axis.size
            told = expert_traffic(
                cfg, rows, away, axis.size, dtype.itemsize, recomputed=recomputed, counts=False, blocks=cfg.num_layers
            )
            closed = by_purpose(told)
            assert counts == closed, (counts, closed)
        else:
            assert out.expert_tokens is not None
            every = (
                all_gather(out.expert_tokens, axis, "test").view(axis.size, cfg.num_layers, axis.size, -1).sum(-1)
            )  # from, layer, to
            closed = {}
            for layer in range(cfg.num_layers):
                send, came = every[axis.coord, layer], every[:, layer, axis.coord]
                numbers = [
                    int(n)
                    for n in (send.sum(), send.sum() - send[axis.coord], came.sum(), came.sum() - came[axis.coord])
                ]
                told = expert_traffic(
                    cfg, *numbers[:2], axis.size, dtype.itemsize, tuple(numbers[2:]), int(recomputed > 0)
                )  # type: ignore[arg-type]
                for purpose, c in by_purpose(told).items():
                    have = closed.get(purpose)
                    closed[purpose] = (
                        c
                        if have is None
                        else type(c)(
                            have.calls + c.calls, have.payload_bytes + c.payload_bytes, have.sent_bytes + c.sent_bytes
                        )
                    )
            assert counts == closed, (counts, closed)
        tensor = mesh.axis("tensor")
        told = by_purpose(
            tensor_traffic(cfg, TOKENS, tensor.size, mesh.layout.mode, dtype.itemsize, recomputed=recomputed)
        )
        told.pop("partial gradients", None)
        assert over == told, (over, told)


@pytest.mark.parametrize("layout", [Layout(2, expert=2), Layout(4, tensor=2, expert=2, mode="fsp")])
def test_bytes_are_those_of_the_closed_form(layout):
    run_ranks(sends, layout)


def test_a_step_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    init_distributed("fake", place=Place(3, 4, 0))
    try:
        recorder = Recorder()
        mesh = make_mesh(Layout(4, tensor=2, expert=2), recorder=recorder)
        for factor in (0.0, 1.0):
            cfg = config(capacity_factor=factor)
            model = Transformer(cfg, device="meta", dtype=torch.bfloat16)
            expert_parallel(model, mesh, tensor_parallel(model, mesh.axis("tensor"), "mtp"))
            recorder.reset()
            with FakeTensorMode():
                for module in model.modules():
                    for name, p in list(module.named_parameters(recurse=False)):
                        setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype)))
                ids = torch.zeros(64, dtype=torch.int64)
                out = model(ids, labels=ids)
                assert isinstance(out, LossOutput) and out.extra_sum is not None
                (out.loss_sum + out.extra_sum).backward()
            rows = slot_rows(cfg, 64) if factor else 128
            closed = by_purpose(expert_traffic(cfg, rows, rows // 2, 2, counts=not factor, blocks=2))
            assert {purpose: c for (name, purpose, _), c in recorder.counts.items() if name == "expert"} == closed
    finally:
        destroy()


def all_to_one(mesh: Mesh) -> tuple[float, list[int], list[bool]]:
    "A gate that knows no difference sends every token to the same expert: one rank computes, the other has nothing"
    cfg = config(num_experts=2, experts_per_token=1)
    model, _ = build(cfg, mesh)
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.gate.weight.zero_()  # type: ignore[union-attr]
    out = forward(model, cfg, 0)
    assert out.extra_sum is not None and out.expert_tokens is not None
    (out.loss_sum + out.extra_sum).backward()
    assert all(p.grad is not None for p in model.parameters())
    idle = [not block.feed_forward.experts.w1.grad.any() for block in model.blocks]  # type: ignore[union-attr]
    return out.loss_sum.item(), out.expert_tokens[0].tolist(), idle


def test_a_rank_that_no_token_comes_to():
    loss, tokens, _ = all_to_one(single())
    assert sorted(tokens) == [0, TOKENS]
    ranks = run_ranks(all_to_one, Layout(2, expert=2))
    assert all(abs(r[0] - loss) <= 1e-12 * loss for r in ranks) and sorted(r[2][0] for r in ranks) == [False, True]


# which part is where


def test_two_cuts_tile_the_whole():
    for shape, dim in (((4, 6, 5), 1), ((4, 5, 6), 2)):
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        parts = [Placement(shape, dim, t, 2, more=(Cut("expert", 0, e, 2),)) for t in range(2) for e in range(2)]
        for p in parts:
            assert p.cut(whole).shape == p.local_shape
            assert torch.equal(torch.cat([whole.flatten()[a:b] for a, b in p.pieces()]), p.cut(whole).flatten())
            assert p.counted and p.is_cut("expert") and p.is_cut("tensor")
        assert sorted(torch.cat([p.cut(whole).flatten() for p in parts]).tolist()) == list(range(whole.numel()))
    uncut = [Placement((3,), None, t, 2, more=(Cut("expert", None, e, 2),)) for t in range(2) for e in range(2)]
    assert [p.counted for p in uncut] == [True, False, False, False] and not uncut[1].is_cut("expert")
    with pytest.raises(ValueError, match="two axes cannot cut the same dim"):
        Placement((4, 4), 0, 0, 2, more=(Cut("expert", 0, 0, 2),))
    with pytest.raises(
        ValueError, match=r"dim 0 of shape .* is not divisible by 3 ranks: choose a size of the expert axis"
    ):
        Placement((4, 4), 1, 0, 2, more=(Cut("expert", 0, 0, 3),))


def test_weights_are_drawn_in_place():
    cfg = config(num_shared_experts=1)
    whole = Transformer(cfg)
    init_weights(whole, seed=5)
    for t in range(2):
        for e in range(2):
            model = Transformer(cfg, device="meta")
            placements = tensor_parallel(model, Axis("tensor", (0, 1), t, 2), "msp")
            mesh = single()
            mesh._axes["expert"] = Axis("expert", (0, 1), e, 2)
            placements = expert_parallel(model, mesh, placements)
            assert (
                list(placements)
                == [name for name, _ in whole.named_parameters()]
                == [name for name, _ in model.named_parameters()]
            )
            allocate(model, "cpu")
            init_placed(model, placements, seed=5, piece=100)
            for name, p in model.named_parameters():
                assert torch.equal(p, placements[name].cut(whole.get_parameter(name))), name


def test_rows_are_regrouped_by_expert():
    torch.manual_seed(0)
    received = torch.randint(0, 4, (3, 5))
    experts = torch.cat([torch.arange(5).repeat_interleave(row) for row in received])  # sender by sender
    out = torch.empty_like(experts)
    out[regroup(received, len(experts))] = experts
    assert torch.equal(out, experts.sort(stable=True).values)


def test_what_does_not_fit_is_named():
    mesh = single()
    mesh._axes["expert"] = Axis("expert", (0, 1, 2), 0, 3)
    model = Transformer(config(), device="meta")
    with pytest.raises(ValueError, match="num_experts 4 is not divisible by expert 3"):
        expert_parallel(model, mesh, placements_of(model))
    dense = Transformer(config(num_experts=0), device="meta")
    with pytest.raises(ValueError, match="the model has no experts: write expert 1"):
        expert_parallel(dense, mesh, placements_of(dense))
    alone = placements_of(dense)
    assert expert_parallel(dense, single(), alone) is alone
    assert (
        expert_parallel(model, single(), placements_of(model)) == placements_of(model)
        and type(model.blocks[0].feed_forward) is MixtureOfExperts
    )


# saved once, loaded by any layout


def run_config(cfg: ModelConfig) -> RunConfig:
    return RunConfig("experts", cfg, DataConfig(seq_len=TOKENS, micro_num=PACKS), OPTIM)


def save(mesh: Mesh, cfg: ModelConfig, folder: str) -> list[str]:
    model, placements = build(cfg, mesh)
    opt = make_optimizer(model, OPTIM, PRECISIONS["float64"], mesh, None, placements)
    opt.zero_grad()
    opt.last_micro_batch()
    forward(model, cfg, mesh.axis("data").coord).loss_sum.backward()
    opt.update()
    save_run(folder, model, opt, TrainState(step=1), run_config(cfg), mesh=mesh)
    return [shard.name for shard in opt.engine.shards if placements[shard.name].is_cut("expert")]


def load(mesh: Mesh, cfg: ModelConfig, folder: str) -> None:
    model, placements = build(cfg, mesh)
    opt = make_optimizer(model, OPTIM, PRECISIONS["float64"], mesh, None, placements)
    with torch.no_grad():
        for name, part in opt.named_parts().items():
            if not name.startswith("adam_step"):
                part.tensor.fill_(float("nan"))
    checkpoint = Checkpoint(folder)
    assert load_run(checkpoint, model, opt).step == 1
    for name, p in model.named_parameters():
        assert torch.equal(p, placements[name].cut(checkpoint.read(f"model.{name}"))), name
        assert torch.equal(
            opt.named_parts()[f"exp_avg.{name}"].tensor,
            placements[name].cut(checkpoint.read(f"exp_avg.{name}")).flatten(),
        ), name


def test_any_layout_loads_what_any_saved(tmp_path):
    cfg = config(num_shared_experts=1)
    cut = run_ranks(save, Layout(4, tensor=2, expert=2), cfg, str(tmp_path / "1"))
    assert all(len(names) == 3 * cfg.num_layers for names in cut)
    load(single(), cfg, str(tmp_path / "1"))
    run_ranks(load, Layout(4, expert=4), cfg, str(tmp_path / "1"))


def written(mesh: Mesh, cfg: ModelConfig) -> dict[tuple, int]:
    "Elements of weights that this rank writes, by parameter and place"
    model, placements = build(cfg, mesh)
    chunks = state_chunks(make_optimizer(model, OPTIM, PRECISIONS["float64"], mesh, None, placements), saving=True)
    return {(n, c.offsets, c.start): c.tensor.numel() for n, c in chunks.items() if n.startswith("model.")}


def test_each_part_is_written_by_one_rank():
    cfg = config()
    ranks = run_ranks(written, Layout(8, tensor=2, expert=2), cfg)
    places = [place for mine in ranks for place in mine]
    assert len(places) == len(set(places))  # nothing twice
    by_name: dict[str, int] = {}
    for (name, *_), count in (item for mine in ranks for item in mine.items()):
        by_name[name] = by_name.get(name, 0) + count
    whole = Transformer(cfg, device="meta")
    assert by_name == {f"model.{n}": p.numel() for n, p in whole.named_parameters()}  # all of it
    sizes = [sum(mine.values()) for mine in ranks]
    assert max(sizes) < 1.1 * min(sizes)


def faulty(mesh: Mesh, cfg: ModelConfig) -> dict:
    "Three steps with one fault after another"
    import internlm_nb.parallel.expert as expert
    import internlm_nb.zero.hybrid as hybrid
    import internlm_nb.zero.units as units

    out = {}
    for fault in ("balance", "replica", "norm"):
        with pytest.MonkeyPatch.context() as patch:
            if fault == "balance":  # its gradient counts once for every tensor rank
                patch.setattr(expert.SplitMixture, "share", lambda self, term: term)
            elif fault == "replica":  # experts are added up over ranks that hold other ones
                patch.setattr(hybrid, "by_kind", lambda params, placements: units.by_kind(params, {}))
            else:  # what is whole counts once for every tensor rank
                patch.setattr(hybrid, "counts", lambda place: True)
            out[fault] = three_steps(mesh, cfg)
    return out


def test_the_law_can_be_broken():
    cfg = config()
    figures, grads, _, _ = three_steps(single(), cfg)
    for fault, (got, first, _, placements) in run_ranks(faulty, Layout(4, tensor=2, expert=2), cfg, timeout=120)[
        0
    ].items():
        if fault == "norm":
            assert abs(got[0][1] - figures[0][1]) > 1e-3 * figures[0][1]
        else:
            assert (
                max(
                    ((first[n] - p.cut(grads[n])).abs().max() / grads[n].abs().max()).item()
                    for n, p in placements.items()
                )
                > 1e-3
            ), fault


def test_experts_of_one_rank_are_those_of_the_model():
    model = Transformer(config(), device="meta")
    mesh = single()
    mesh._axes["expert"] = Axis("expert", (0, 1), 1, 2)
    placements = expert_parallel(model, mesh, placements_of(model))
    experts = model.blocks[0].feed_forward.experts
    assert isinstance(experts, SplitExperts) and experts.w1.shape[0] == 2
    assert placements["blocks.0.feed_forward.experts.w1"].region[0] == (2, 4)

"A pack cut over sequence and context: nothing is lost or doubled, work is even, and a model on its shares computes what one process does"

import random
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from internlm_nb.model.attention import attention
from internlm_nb.model.config import Family, ModelConfig, family_defaults
from internlm_nb.model.init import allocate
from internlm_nb.model.loss import LossOutput
from internlm_nb.model.segments import Inputs, KVCache, Segments
from internlm_nb.model.transformer import Transformer, recompute
from internlm_nb.parallel import comm
from internlm_nb.parallel.context import sequence_parallel
from internlm_nb.parallel.layout import Coords, Layout
from internlm_nb.parallel.mesh import Mesh, make_mesh
from internlm_nb.parallel.placement import add_up, placements_of
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.parallel.record import Recorder
from internlm_nb.parallel.sequence import LocalSegments, Ring, cut_rows, ring_of, ulysses
from internlm_nb.parallel.tensor import tensor_parallel
from internlm_nb.parallel.traffic import by_purpose, context_traffic, sequence_traffic, tensor_traffic

Lengths = tuple[int, ...]


def draw_lengths(pick: random.Random, tokens: int) -> Lengths:
    "Documents of a pack: one alone, many of one token, or any mixture; now and then an empty one"
    kind = pick.choice(["one", "short", "mixed", "mixed", "ends"])
    if kind == "one":
        return (tokens,)
    if kind == "ends" and tokens > 2:
        return (1, tokens - 2, 1)
    borders = sorted(
        pick.sample(range(1, tokens), min(tokens - 1, pick.randint(1, 6) if kind == "mixed" else tokens // 2))
    )
    lengths = [b - a for a, b in zip([0, *borders], [*borders, tokens])]
    if pick.random() < 0.2:
        lengths.insert(pick.randint(0, len(lengths)), 0)
    return tuple(lengths)


# arithmetic, without processes


def pairs_of(lengths: Lengths) -> dict[tuple[int, int], int]:
    "Each query with each key that it must see, once"
    offsets = list(accumulate(lengths, initial=0))
    return {(q, k): 1 for begin, end in pairwise(offsets) for q in range(begin, end) for k in range(begin, q + 1)}


def computed(lengths: Lengths, layout: Layout) -> tuple[dict[tuple[int, int], int], list[list[int]]]:
    "How often the ranks' plans compute each pair; and how many pairs each rank computes at each step"
    count: dict[tuple[int, int], int] = {}
    work = [[0] * layout.context for _ in range(layout.context)]
    plans: list[Ring | None] = []
    crossing: list[list[int]] = []
    for context in range(layout.context):
        rows = torch.cat(
            [cut_rows(lengths, layout, Coords(sequence=s, context=context))[0] for s in range(layout.sequence)]
        ).tolist()
        local = cut_rows(lengths, layout, Coords(context=context))[1]
        assert local.shard.tokens == len(rows)
        at = 0
        for n in local.shard.lengths:  # causal within each piece: by the library's kernels, or by the ring's own part
            for i in range(at, at + n):
                for j in range(at, i + 1):
                    count[rows[i], rows[j]] = count.get((rows[i], rows[j]), 0) + 1
                    work[context][0] += 1
            at += n
        plans.append(local.ring)
        crossing.append([])
        if local.ring is not None:
            ring, begin = local.ring, 0
            for n, crosses in ring.cuts:
                crossing[-1] += rows[begin : begin + n] if crosses else []
                begin += n
            assert begin == len(rows) and sum(ring.lengths) == len(crossing[-1])
            assert (ring.alone.tokens if ring.alone else 0) == begin - len(crossing[-1])
    for context, ring in enumerate(plans):
        for step, hop in enumerate(ring.hops if ring else (), 1):
            behind = (context - step) % layout.context
            theirs = plans[behind]
            sent = theirs.hops[step - 1].send if theirs else (0, 0)
            assert sent[1] - sent[0] == hop.receive and (hop.receive > 0) == (hop.queries[1] > hop.queries[0])
            for q in crossing[context][slice(*hop.queries)]:
                for k in crossing[behind][slice(*sent)]:
                    count[q, k] = count.get((q, k), 0) + 1
                    work[context][step] += 1
    return count, work


@pytest.mark.parametrize("seed", range(40))
def test_every_token_and_every_pair_exactly_once(seed):
    pick = random.Random(seed)
    c, s = pick.choice([1, 2, 3, 4, 5, 8]), pick.choice([1, 2, 3])
    layout = Layout(c * s, sequence=s, context=c)
    tokens = (2 * c if c > 1 else 1) * s * pick.randint(1, 3)
    lengths = draw_lengths(pick, tokens)
    whole = Segments.from_lengths(lengths)
    of_document = [n for n in lengths for _ in range(n)]
    seen = []
    for rank in range(layout.world):
        rows, local = cut_rows(lengths, layout, layout.coords(rank))
        assert (
            local.tokens == len(rows) == tokens // layout.world
            and local.cu_seqlens[-1] == local.tokens
            and local.max_seqlen == max(local.lengths)
        )
        assert torch.equal(local.indexes(), whole.indexes()[rows])
        assert [n for n, piece in zip(local.document_lengths, local.lengths) for _ in range(piece)] == [
            of_document[t] for t in rows.tolist()
        ]
        seen += rows.tolist()
    assert sorted(seen) == list(range(tokens))
    count, _ = computed(lengths, layout)
    assert count == pairs_of(lengths)


@pytest.mark.parametrize("context", [2, 3, 4, 7])
def test_zigzag_is_even(context):
    "Of one long document every rank computes equally many pairs, at every step"
    tokens = 2 * context * 6
    _, work = computed((tokens,), Layout(context, context=context))
    own, rectangle = 12 * 13 // 2, 12 * 6
    assert work == [[own] + [rectangle] * (context - 1)] * context


def test_short_documents_need_no_messages():
    for context in range(4):
        assert ring_of((4,) * 8, Layout(4, context=4), context) is None  # none crosses a border of two chunks
    plans = [ring_of((3, 10, 3, 4, 4, 4, 4), Layout(4, context=4), context) for context in range(4)]
    sent = [[hop.send for hop in ring.hops if hop.send[1]] for ring in plans if ring]
    assert sent == [[(0, 1)] * 3, [(0, 4)] * 2, [(0, 4)], []]  # only to those with later chunks


def test_wrong_cuts_are_refused():
    with pytest.raises(ValueError, match="pad it to a multiple of 8"):
        cut_rows((20,), Layout(4, sequence=2, context=2), Coords())
    with pytest.raises(ValueError, match="at least one token"):
        cut_rows((0,), Layout(1), Coords())
    _, local = cut_rows((8,), Layout(2, sequence=2), Coords())
    q = torch.zeros(4, 2, 8)
    axis = type("One", (), {"size": 1})()
    with pytest.raises(ValueError, match="cut_rows"):
        ulysses(attention, axis)(q, q, q, Segments.from_lengths([4]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache"):
        ulysses(attention, axis)(q, q, q, local, key_segments=local)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="make sequence a divisor"):
        run_mesh = Layout(3, sequence=3)
        mesh = type(
            "M",
            (),
            {
                "layout": run_mesh,
                "axis": lambda self, name: type("A", (), {"size": 3 if name == "sequence" else 1, "backend": ""})(),
            },
        )()
        sequence_parallel(Transformer(config("llama"), device="meta"), mesh)  # type: ignore[arg-type]


# a model on shares of its tokens


def config(family: Family, **changes) -> ModelConfig:
    special: dict = {
        "internlm": dict(
            num_heads=4, num_kv_heads=4, max_position_embeddings=8
        ),  # biases; dynamic rope, stretched by documents of more than 8 tokens
        "internlm2": dict(num_heads=4, num_kv_heads=2, norm_head=True, qk_interleaved=True, mlp_ratio=2.0),
        "llama": dict(num_heads=8, num_kv_heads=2),
    }[family]
    return ModelConfig(
        **{
            **family_defaults(family),
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "multiple_of": 8,
            **special,
            **changes,
        }
    )  # type: ignore[arg-type]


def fill(model: torch.nn.Module, placements: dict) -> None:
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            place = placements[name]
            whole = torch.randn(place.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            p.copy_(place.cut(1 + 0.2 * whole if name.endswith("norm.weight") else 0.15 * whole))


def pack(cfg: ModelConfig, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(cfg.vocab_size, (tokens,), generator=g) for _ in range(2))
    labels[torch.rand(tokens, generator=g) < 0.2] = -100
    return ids, labels


def alone(cfg: ModelConfig, lengths: Lengths, dtype: torch.dtype, seed: int):
    "One process, the whole pack"
    model = allocate(Transformer(cfg, device="meta", dtype=dtype), "cpu")
    fill(model, placements_of(model))
    ids, labels = pack(cfg, sum(lengths), seed)
    out = model(ids, Segments.from_lengths(lengths), labels=labels)
    out.loss_sum.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def near(have: Tensor, want: Tensor, tolerance: float, what: object) -> None:
    torch.testing.assert_close(
        have, want, rtol=0, atol=tolerance * max(want.abs().max().item(), 1e-30), msg=lambda m: f"{what}: {m}"
    )


def same_computation(cases: list) -> None:
    meshes: dict[Layout, Mesh] = {}
    for seed, (layout, family, changes, policy, lengths, dtype) in enumerate(cases):
        what = layout, family, changes, policy, lengths, dtype
        if layout not in meshes:
            meshes[layout] = make_mesh(layout, timeout=60)
        mesh, cfg = meshes[layout], config(family, **changes)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5  # float32: sums over at most some hundred tokens
        want, grads = alone(cfg, lengths, dtype, seed)
        model = Transformer(cfg, device="meta", dtype=dtype)
        placements = tensor_parallel(model, mesh.axis("tensor"), layout.mode)
        sequence_parallel(model, mesh)
        allocate(model, "cpu")
        fill(model, placements)
        recompute(model, 0.0 if policy == "none" else 1.0, "full" if policy == "none" else policy)
        ids, labels = pack(cfg, sum(lengths), seed)
        rows, local = cut_rows(lengths, layout, mesh.coords)
        recorders = {name: heard(mesh, name) for name in ("tensor", "sequence", "context")}
        out = model(ids[rows], local, labels=labels[rows])
        assert isinstance(out, LossOutput)
        out.loss_sum.backward()
        have = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        add_up([g for name, g in have.items() if placements[name].partial], mesh.axis("tensor"), "partial gradients")
        recomputed = 0 if policy == "none" else cfg.num_layers
        closed = {
            "tensor": by_purpose(
                tensor_traffic(cfg, len(rows), layout.tensor, layout.mode, dtype.itemsize, recomputed)
            ),
            "sequence": by_purpose(sequence_traffic(cfg, sum(lengths), layout, dtype.itemsize, recomputed)),
            "context": by_purpose(context_traffic(cfg, lengths, layout, mesh.coords, dtype.itemsize, recomputed)),
        }
        for name, recorder in recorders.items():
            assert {purpose: count for (_, purpose, _), count in recorder.counts.items()} == closed[name], (name, what)
            object.__setattr__(mesh.axis(name), "recorder", None)
        replica = mesh.axis("replica")
        near(comm.all_reduce(out.loss_sum.detach(), replica, "test"), want.loss_sum.detach(), tolerance, ("loss", what))
        near(out.token_loss, want.token_loss[rows], tolerance, ("token_loss", what))
        assert torch.equal(out.correct, want.correct[rows])
        assert set(have) == set(grads)
        for name, grad in grads.items():
            near(comm.all_reduce(have[name], replica, "test"), placements[name].cut(grad), tolerance, (name, what))
        with torch.no_grad():  # evaluation, and positions given as a batch gives them
            indexes = Segments.from_lengths(lengths).indexes()
            near(
                model(ids[rows], local, indexes[rows], labels=labels[rows]).token_loss,
                want.token_loss[rows],
                tolerance,
                ("evaluation", what),
            )
        mesh.check_waited()


def heard(mesh: Mesh, name: str) -> Recorder:
    recorder = Recorder()
    object.__setattr__(mesh.axis(name), "recorder", recorder)
    return recorder


CROSSING = (7, 1, 22, 1, 1, 13, 3)  # 48 tokens, on every border of chunks a document
F64, F32 = torch.float64, torch.float32
CASES = [
    (Layout(4, sequence=4), "llama", {}, "none", CROSSING, F64),  # more ranks than key heads
    (Layout(4, sequence=4), "internlm", {}, "selective", CROSSING, F64),
    (Layout(4, context=4), "internlm", {}, "full", CROSSING, F64),
    (Layout(4, context=4), "llama", dict(num_layers=1), "selective", (48,), F64),
    (Layout(4, context=4), "internlm2", {}, "none", (1,) * 8 + (40,), F64),
    (Layout(4, context=4), "llama", {}, "none", (12, 6, 30), F32),
    (Layout(4, sequence=2, context=2), "internlm2", {}, "selective", CROSSING, F64),
    (Layout(4, sequence=2, context=2), "internlm", {}, "none", (48,), F64),
    (Layout(4, sequence=2, context=2), "llama", dict(num_kv_heads=1, tie_embeddings=True), "full", (5, 43), F64),
    (Layout(4, sequence=2, tensor=2, mode="msp"), "internlm", {}, "none", CROSSING, F64),
    (Layout(4, sequence=2, tensor=2, mode="fsp"), "llama", {}, "selective", CROSSING, F64),
    (Layout(4, context=2, tensor=2, mode="mtp"), "internlm2", {}, "full", CROSSING, F64),
    (Layout(4, context=2, tensor=2, mode="fsp"), "internlm", {}, "none", (3, 45), F64),
]


def test_any_cut_is_the_same_computation():
    run_ranks(same_computation, 4, CASES, timeout=120)


def draw_case(seed: int, world: int):
    pick = random.Random(seed)
    tensor, sequence = pick.choice([(t, s) for t in (1, 2) for s in (1, 2, 4) if world % (t * s) == 0])
    layout = Layout(
        world,
        tensor=tensor,
        sequence=sequence,
        context=world // (tensor * sequence),
        mode=pick.choice(["mtp", "msp", "fsp"]),
    )
    family = pick.choice(["internlm", "internlm2", "llama"])
    kv_heads = pick.choice(
        [n for n in (1, 2, 4, 8) if n % tensor == 0 and (n // tensor % sequence == 0 or sequence % (n // tensor) == 0)]
    )
    changes = dict(num_heads=8, num_kv_heads=kv_heads, num_layers=pick.randint(1, 2))
    parts = 2 * layout.context * sequence * tensor
    tokens = parts * pick.randint(1, max(1, 64 // parts))
    return (
        layout,
        family,
        changes,
        pick.choice(["none", "full", "selective"]),
        draw_lengths(pick, tokens),
        pick.choice([F64, F64, F64, F32]),
    )


def test_any_cut_drawn():
    run_ranks(same_computation, 4, [draw_case(seed, 4) for seed in range(3)], timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("world, first", [(2, 0), (4, 100), (4, 200), (8, 300), (8, 400), (3, 500), (6, 600)])
def test_any_cut_sweep(world, first):
    run_ranks(same_computation, world, [draw_case(seed, world) for seed in range(first, first + 25)], timeout=600)


def test_draws_reach_everything():
    cases = [draw_case(seed, 8) for seed in range(300, 450)]
    assert {(c[0].tensor, c[0].sequence, c[0].context) for c in cases} == {
        (1, 1, 8),
        (1, 2, 4),
        (1, 4, 2),
        (2, 1, 4),
        (2, 2, 2),
        (2, 4, 1),
    }
    assert (
        any(c[2]["num_kv_heads"] // c[0].tensor < c[0].sequence for c in cases)
        and any(len(c[4]) == 1 for c in cases)
        and any(0 in c[4] for c in cases)
    )


# with the rest of the house


def house(mesh: Mesh) -> None:
    cfg = config("internlm2")
    ids, labels = pack(cfg, 48, 0)
    rows, local = cut_rows(CROSSING, mesh.layout, mesh.coords)
    results = []
    for compiled in (False, True):
        model = allocate(Transformer(cfg, device="meta", dtype=F64), "cpu")
        sequence_parallel(model, mesh)
        fill(model, placements_of(model))
        for block in model.blocks if compiled else ():
            block.attention.attend = torch.compiler.disable(block.attention.attend)  # type: ignore[union-attr]
            block.compile(backend="aot_eager")  # type: ignore[operator]
        out = model(ids[rows], local, labels=labels[rows])
        assert isinstance(out, LossOutput)
        out.loss_sum.backward()
        results.append([out.loss_sum.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="generate with sequence 1"):
        model(ids[rows], local, cache=KVCache.empty(len(local.lengths)))
    with pytest.raises(ValueError, match="generate with sequence 1"):
        model(ids[rows], local, last_only=True)
    with pytest.raises(ValueError, match="cut_rows"):
        Transformer.forward(_plain(cfg, mesh), ids[rows])
    # bfloat16: the sums are wide, so the ring adds no more than the rounding of one result
    model, short = (allocate(Transformer(cfg, device="meta", dtype=torch.bfloat16), "cpu") for _ in range(2))
    for each in (model, short):
        fill(each, placements_of(each))
    sequence_parallel(model, mesh)
    want = short(ids, Segments.from_lengths(CROSSING))[rows].float()
    assert (model(ids[rows], local).float() - want).abs().max() <= 0.05 * want.abs().max()


def _plain(cfg: ModelConfig, mesh: Mesh) -> Transformer:
    model = Transformer(cfg)
    sequence_parallel(model, mesh)
    return model


def test_compiled_cached_and_in_bfloat16():
    run_ranks(house, Layout(2, context=2), timeout=120)


def test_rope_takes_the_documents_length():
    "A piece of a long document is stretched as the document is, not as a document of the piece's length"
    cfg = config("internlm")
    whole = Segments.from_lengths((30, 2))
    _, local = cut_rows((30, 2), Layout(4, sequence=4), Coords(sequence=3))
    assert (
        isinstance(local, LocalSegments)
        and local.lengths == (6, 2)
        and local.document_lengths == (30, 2)
        and whole.document_lengths == (30, 2)
    )
    ids = torch.zeros(32, dtype=torch.int64)
    full, part = Inputs.of(cfg, ids, whole).positions(cfg), Inputs.of(cfg, ids[24:], local).positions(cfg)
    assert torch.equal(part.cos, full.cos[24:]) and torch.equal(part.sin, full.sin[24:])
    naive = Inputs.of(cfg, ids[24:], Segments.from_lengths((6, 2)), local.indexes()).positions(cfg)
    assert not torch.equal(naive.cos, part.cos)

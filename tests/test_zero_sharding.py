"Hybrid ZeRO's arithmetic: chains of factors, names, slices, memory, bytes by link, and the published cost model"

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.model.config import num_params, preset
from internlm_nb.model.transformer import Transformer
from internlm_nb.parallel.layout import Layout
from internlm_nb.zero.amsp import Links, amsp_time, best, ranked, ring_s
from internlm_nb.zero.costs import Widths, exchanges, leaving, state_bytes
from internlm_nb.zero.flat import ShardCoord, lay_out
from internlm_nb.zero.sharding import Sharding, greedy_owners, internevo_sharding, known_factors, shardings

LAW = settings(deadline=None, max_examples=40, derandomize=True)
NUMBER = st.sampled_from([-1, 1, 2, 3, 4, 6, 8, 12, 16])


@st.composite
def placed(draw, expert=False):
    "A layout and a chain that fits it"
    sizes = [1] * 9
    for where, factor in draw(
        st.lists(st.tuples(st.integers(0, 8), st.sampled_from([2, 3])), max_size=6)
    ):  # up to 729 ranks
        sizes[where] *= factor
    t, s, c, n, e = sizes[:5]
    layout = Layout(math.prod(sizes), t, s, c, n, e if expert else 1)
    z = layout.replica // layout.expert
    choices = shardings(z)
    return layout, choices[draw(st.integers(0, len(choices) - 1))]


@LAW
@given(NUMBER, NUMBER, NUMBER, st.sampled_from([1, 2, 3, 4, 8, 12, 24]))
def test_a_chain_is_taken_and_anything_else_refused_with_a_chain_that_is_taken(p, g, o, z):
    value = {-1: math.inf}  # -1 is Z, which every number may divide
    ok = all(b == -1 or (a != -1 and value.get(b, b) % a == 0) for a, b in ((p, g), (g, o)))
    if not ok:
        with pytest.raises(ValueError, match="each must divide the next") as e:
            Sharding(p, g, o)
        suggestion = eval(str(e.value).split("write ")[1], {"Sharding": Sharding})
        assert suggestion.param == p
        return
    sharding = Sharding(p, g, o)
    p, g, o = (z if x == -1 else x for x in (p, g, o))
    if g % p or o % g or z % o:
        with pytest.raises(ValueError):
            sharding.resolved(z)
    else:
        assert sharding.resolved(z).factors == (p, g, o)


@pytest.mark.parametrize("wrong", [0, -2, 1.0, True, "8"])
@pytest.mark.parametrize("name", ["param", "grad", "optim"])
def test_a_factor_is_a_positive_integer_or_minus_one(name, wrong):
    with pytest.raises(ValueError, match=f"{name} is .*positive integer, or -1"):
        Sharding(**{name: wrong})


def test_the_message_for_ranks_says_what_fits():
    with pytest.raises(ValueError, match=r"optim 16 does not divide 24; write Sharding\(param=2, grad=4, optim=8\)"):
        Sharding(2, 4, 16).resolved(24)


@LAW
@given(placed(expert=True), st.data())
def test_experts_get_a_chain_that_fits_their_groups(case, data):
    layout, _ = case
    choices = [s for s in shardings(layout.replica)]
    sharding = choices[data.draw(st.integers(0, len(choices) - 1))]
    fewer = layout.replica // layout.expert
    experts = sharding.for_experts(fewer)
    assert all(a % b == 0 for a, b in zip(sharding.factors, experts.factors))  # never finer
    assert layout.expert > 1 or experts == sharding
    layout.nested(*experts.factors, expert=True)  # raises when it is no chain
    assert Sharding(-1, -1, -1).for_experts(fewer) == Sharding(fewer, fewer, fewer)


def test_names_of_the_spec():
    z = 64
    want = {
        "ddp": (1, 1, 1), "zero1": (1, 1, z), "zero1-in-node": (1, 1, 8), "zero2": (1, z, z), "zero3": (z, z, z), "fsdp": (z, z, z),
        "hsdp": (8, 8, 8), "mics": (8, 8, 8), "hybrid": (8, 8, z), "isp": (8, 8, z),
    }  # fmt: skip
    assert {name: tuple(Sharding.named(name, z).factors) for name in known_factors(z)} == want
    assert Sharding.named("hsdp", z, node=4) == Sharding(4, 4, 4)
    assert Sharding.named("hsdp", 4) == Sharding(4, 4, 4)  # a world smaller than a node
    assert Sharding(-1, -1, -1).name(z) == "zero3" and Sharding(2, 4, 8).name(z) is None
    assert "hybrid: parameters over 8" in Sharding(8, 8, -1).describe(z) and Sharding(2, 4, 8).describe(z).startswith(
        "parameters over 2"
    )
    with pytest.raises(ValueError, match="did you mean hsdp"):
        Sharding.named("hsdpp", z)
    with pytest.raises(ValueError, match="optim 8 does not divide 12"):
        Sharding.named("zero1-in-node", 12)


@pytest.mark.parametrize("z", [1, 2, 6, 12, 36, 64])
def test_every_chain_is_there_once(z):
    found = [tuple(s.factors) for s in shardings(z)]
    assert found == [
        x
        for x in itertools.product(range(1, z + 1), repeat=3)
        if x[1] % x[0] == 0 and x[2] % x[1] == 0 and z % x[2] == 0
    ]


def sets(text):
    "Groups as the spec writes them"
    return {tuple(map(int, g.split(","))) for g in text.strip("[]").split("][")}


@pytest.mark.parametrize(
    ("layout", "zero1", "weight", "axis", "groups"),
    [
        (Layout(16, tensor=2, pipeline=2), 2, 1, "optim", "[0,2][1,3][4,6][5,7][8,10][9,11][12,14][13,15]"),
        (Layout(32), 2, 8, "optim", "".join(f"[{b + i},{b + i + 8}]" for b in (0, 16) for i in range(8))),
        (Layout(16, pipeline=2), 1, 2, "copies", "[0,2,4,6][1,3,5,7][8,10,12,14][9,11,13,15]"),
    ],
)
def test_older_configurations_give_the_older_groups(layout, zero1, weight, axis, groups):
    s = internevo_sharding(zero1, layout.replica, weight)
    assert set(layout.nested(*s.factors)[axis]) == sets(groups)


def test_older_numbers():
    assert internevo_sharding(-1, 16) == internevo_sharding(0, 16) == Sharding(1, 1, 16)
    assert internevo_sharding(1, 16) == Sharding() and internevo_sharding(8, 16) == Sharding(1, 1, 8)
    assert internevo_sharding(-1, 16, 4) == Sharding(4, 4, 16) and internevo_sharding(1, 16, 4) == Sharding(4, 4, 4)
    for zero1, weight in ((3, 1), (8, 4), (-1, 3)):
        with pytest.raises(ValueError, match="divide"):
            internevo_sharding(zero1, 16, weight)


@LAW
@given(placed())
def test_slices_are_what_the_nested_groups_exchange(case):
    "Handing each member of a group its part, level by level, ends at the slices; and gathering goes back"
    layout, s = case
    size = 3 * s.optim
    nested = layout.nested(*s.factors)
    held = [range(size)] * layout.world
    levels = []
    for axis in ("param", "grad", "optim"):
        after = list(held)
        for group in nested[axis]:
            part = len(held[group[0]]) // len(group)
            for i, rank in enumerate(group):
                assert held[rank] == held[group[0]]  # they reduce the same elements
                after[rank] = held[rank][i * part : (i + 1) * part]
        held = after
        levels.append(held)
    flat = lay_out({"w": (size,)}, s.factors, align=1)
    for rank in range(layout.world):
        spot = ShardCoord(
            *(next(g for g in nested[axis] if rank in g).index(rank) for axis in ("param", "grad", "optim"))
        )
        assert [range(*flat.slice_of(spot, level)) for level in ("param", "grad", "optim")] == [
            level[rank] for level in levels
        ]


@LAW
@given(st.sampled_from(shardings(48)), st.integers(1, 10**6))
def test_memory_is_the_closed_form(s, n):
    phi = n * 48
    assert state_bytes(phi, s, widths=Widths(grad=2)).total == 2 * phi / s.param + 2 * phi / s.grad + 12 * phi / s.optim
    assert state_bytes(phi, s).gradients == 4 * phi / s.grad
    unit = phi // 8
    buffers = state_bytes(phi, s, unit)
    assert buffers.gathered == (s.param > 1) * 2 * 2 * unit + (s.grad > 1) * 4 * 2 * unit
    kept = state_bytes(phi, s, unit, "step").gathered
    assert kept - buffers.gathered == (s.param > 1) * 2 * (phi - 2 * unit)


def by_hand(params, s, layout, micro_num, gathers, node):
    "Each message of each ring, one after another: bytes of all ranks that stay in a node, and that leave it"
    groups = layout.nested(*s.factors)
    p, g, o = s.factors
    steps = [("param", 1, 2 * params, gathers)]  # axis, turns of the ring, bytes, times
    steps += [
        ("param", 1, 4 * params, micro_num),
        ("grad", 1, 4 * params // p, micro_num),
        ("optim", 1, 4 * params // g, 1),
        ("copies", 2, 4 * params // o, 1),
    ]
    steps += [("optim", 1, 2 * params // g, 1), ("grad", 1, 2 * params // p, 1)]
    out = [0.0, 0.0]
    for axis, turns, size, times in steps:
        for group in groups[axis]:
            n = len(group)
            for i in range(n):
                out[group[i] // node != group[(i + 1) % n] // node] += times * turns * (n - 1) * size / n
    return out


@LAW
@given(
    placed(),
    st.integers(1, 3),
    st.sampled_from([("forward", 2), ("backward", 1), ("step", 0), ("never", 0)]),
    st.sampled_from([2, 4, 8]),
)
def test_bytes_by_link_are_those_of_the_rings(case, micro_num, reshard, node):
    layout, s = case
    params = 5 * layout.replica
    name, each = reshard
    found = exchanges(params, s, layout, micro_num, name, node=node)
    inside, between = by_hand(params, s, layout, micro_num, each * micro_num or 1, node)
    # sent bytes are whole numbers here but for rounding up, 1 a time of each exchange; shares are floats
    slack = sum(e.times for e in found) + 1e-9 * (inside + between) / layout.world
    assert abs(sum(e.inside for e in found) - inside / layout.world) <= slack
    assert abs(sum(e.between for e in found) - between / layout.world) <= slack
    assert all(e.ranks > 1 and e.times > 0 for e in found)


@LAW
@given(st.sampled_from(shardings(48)))
def test_levels_together_send_what_one_exchange_would(s):
    "One micro-batch: reductions telescope to 1 - 1/o, and with the copies every gradient is everywhere reduced"
    layout, phi = Layout(48), 48 * 48
    found = exchanges(phi, s, layout)
    reduced = sum(e.sent_bytes for e in found if e.op == "reduce_scatter")
    copies = sum(e.sent_bytes for e in found if e.op == "all_reduce")
    assert reduced == pytest.approx(4 * phi * (1 - 1 / s.optim), rel=1e-12)
    assert copies == pytest.approx(2 * 4 * phi * (1 / s.optim - 1 / 48), rel=1e-12)
    back = sum(e.sent_bytes for e in found if e.phase == "gather after the update")
    assert back == pytest.approx(2 * phi * (1 / s.param - 1 / s.optim), rel=1e-12)


def test_where_a_group_lies():
    layout = Layout(64)
    far = {e.axis: e.between for e in exchanges(640, Sharding(8, 8, 64), layout)}
    assert far["param"] == 0 and far["optim"] > 0
    assert all(e.inside == 0 for e in exchanges(640, Sharding(8, 8, 8), Layout(64, tensor=8)))
    assert leaving(((0, 1, 2, 3, 8, 9, 10, 11),), 8) == 2 / 8  # a ring over two nodes leaves each once
    assert exchanges(640, Sharding(), Layout(8, tensor=8)) == ()
    experts = exchanges(640, Sharding(8, 8, 64), Layout(64, expert=8), expert=True)
    assert {e.ranks for e in experts} == {8}
    with pytest.raises(ValueError, match="choose one of forward, backward, step, never"):
        exchanges(640, Sharding(), layout, reshard="micro")  # type: ignore[arg-type]


def test_ring_times():
    links = Links(inside=100.0, between=10.0, inside_s=1.0, between_s=5.0, node=4)
    assert ring_s("all_gather", 400, 1, 1, links) == 0
    assert ring_s("all_gather", 400, 4, 1, links) == 3 * (1 + 100 / 100)
    assert ring_s("all_reduce", 400, 4, 2, links) == 2 * 3 * (5 + 100 / 5)  # two rings share a node's 10
    assert ring_s("all_gather", 400, 4, 8, links) == 3 * (5 + 100 / 2.5)  # only four ranks of a node can share
    assert ring_s("broadcast", 400, 8, 1, links) == 7 * 5 + 400 / 10


def test_amsp_formula_term_by_term():
    links = Links()
    phi, layers, z, m, u = 10**9, 10, 64, 3, 10**7
    t = amsp_time(phi, layers, Sharding(2, 8, 32), z, m, u, links)
    layer, buckets = 2 * phi / layers, 2 * phi / (u * 2)
    assert t.parameters == pytest.approx(
        m * layers * (2 * ring_s("all_gather", layer, 2, 1) + ring_s("reduce_scatter", layer, 2, 1)), rel=1e-12
    )
    assert t.gradients == pytest.approx((m - 1) * buckets * ring_s("all_reduce", u, 4, 2), rel=1e-12)
    assert t.all_reduce == pytest.approx(buckets * ring_s("all_reduce", u, 32, 2), rel=1e-12)
    assert t.broadcasts == pytest.approx(16 * ring_s("broadcast", 2 * phi / 32, 16, 2), rel=1e-12)


LLAMA = {
    "7B": (6_738_415_616, 32, (1, 1, 8)),
    "13B": (13_015_864_320, 40, (4, 4, 8)),
    "30B": (32_528_943_616, 60, (8, 8, 32)),
}


def test_what_the_model_says_of_the_published_choices():
    "7B is found; the others are within a tenth of the cheapest. ZeRO-1 and ZeRO-3 over all ranks take at least twice as long"
    for name, (phi, layers, theirs) in LLAMA.items():
        choices = ranked(phi, layers, 1024, 40e9)
        theirs = next(c for c in choices if c.sharding == Sharding(*theirs))
        assert theirs.seconds < 1.1 * choices[0].seconds
        assert name != "7B" or theirs == choices[0]
        assert all(c.bytes <= 40e9 for c in choices) and choices[0] == best(phi, layers, 1024, 40e9)
        for s in (Sharding(1, 1, 1024), Sharding(1024, 1024, 1024)):
            assert amsp_time(phi, layers, s, 1024).total > 2 * choices[0].seconds
    assert best(*LLAMA["13B"][:2], 1024, 35e9, micro_num=2).sharding == Sharding(4, 4, 8)


@LAW
@given(st.sampled_from([20e9, 30e9, 40e9, 60e9, 80e9]), st.sampled_from([2e9, 10e9]))
def test_less_memory_never_gets_faster(limit, less):
    assert best(10**10, 32, 64, limit - less).seconds >= best(10**10, 32, 64, limit).seconds


def test_no_room_is_said():
    with pytest.raises(ValueError, match="more than 1e\\+09: take more ranks"):
        best(10**10, 32, 8, 1e9)


def test_older_partition_of_7b():
    cfg = preset("internlm-7b")
    with torch.device("meta"):
        sizes = [w.numel() for w in Transformer(cfg).parameters()]
    owner = greedy_owners(sizes, 8)
    load = [sum(n for n, o in zip(sizes, owner) if o == rank) for rank in range(8)]
    assert load == [907415552, 907411456, 910163968, 910163968] + [921698304] * 4
    assert len(sizes) == 291 and sum(sizes) == num_params(cfg)


@LAW
@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 9))
def test_greedy_loads_differ_by_at_most_one_tensor(sizes, ranks):
    owner = greedy_owners(sizes, ranks)
    load = [sum(n for n, o in zip(sizes, owner) if o == rank) for rank in range(ranks)]
    assert len(owner) == len(sizes) and max(load) - min(load) <= max(sizes, default=0)

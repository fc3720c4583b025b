"Layouts: the spec's groups, and laws of rank arithmetic over drawn sizes"

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.model.config import ModelConfig
from internlm_nb.parallel.layout import Coords, Layout, axis_names, check

LAW = settings(deadline=None, derandomize=True, max_examples=50)
SIZE = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw):
    t, s, c, n, e, copies = (draw(SIZE) for _ in range(6))
    return Layout(t * s * c * n * e * copies, t, s, c, n, e)


def sets(text):
    "Groups as the spec writes them"
    return {tuple(map(int, g.split(","))) for g in text.strip("[]").split("][")}


@pytest.mark.parametrize(
    ("layout", "axis", "groups"),
    [
        (Layout(16, tensor=4, pipeline=2), "data", "[0,4][1,5][2,6][3,7][8,12][9,13][10,14][11,15]"),
        (Layout(16, tensor=4, pipeline=2), "pipeline", "[0,8][1,9][2,10][3,11][4,12][5,13][6,14][7,15]"),
        (Layout(16, tensor=4, pipeline=2), "tensor", "[0,1,2,3][4,5,6,7][8,9,10,11][12,13,14,15]"),
        (Layout(8, tensor=2, expert=2), "expert", "[0,2][4,6][1,3][5,7]"),
        (Layout(8, tensor=2, expert=2), "expert_data", "[0,4][2,6][1,5][3,7]"),
    ],
)
def test_groups_of_the_spec(layout, axis, groups):
    assert set(layout.groups(axis)) == sets(groups)


@pytest.mark.parametrize(
    ("layout", "factors", "name", "groups"),
    [
        (Layout(16, tensor=2, pipeline=2), (1, 1, 2), "optim", "[0,2][1,3][4,6][5,7][8,10][9,11][12,14][13,15]"),
        (Layout(32), (8, 8, 16), "optim", "".join(f"[{b + i},{b + i + 8}]" for b in (0, 16) for i in range(8))),
        (
            Layout(32, sequence=8),
            (8, 8, 16),
            "optim",
            "".join(f"[{b + i},{b + i + 8}]" for b in (0, 16) for i in range(8)),
        ),
        (Layout(16, pipeline=2), (2, 2, 2), "copies", "[0,2,4,6][1,3,5,7][8,10,12,14][9,11,13,15]"),
    ],
)
def test_nested_groups_of_the_spec(layout, factors, name, groups):
    assert set(layout.nested(*factors)[name]) == sets(groups)


@LAW
@given(layouts())
def test_ranks_and_coordinates_are_inverse(layout):
    every = [layout.coords(r) for r in range(layout.world)]
    assert [layout.rank_of(c) for c in every] == list(range(layout.world))
    sizes = (layout.tensor, layout.sequence, layout.context, layout.data, layout.pipeline)
    assert sorted(every) == [Coords(*c) for c in itertools.product(*map(range, sizes))]


@LAW
@given(layouts())
def test_every_rank_is_in_one_group_of_each_kind(layout):
    sizes = {
        **{
            name: getattr(layout, name)
            for name in ("tensor", "sequence", "context", "data", "pipeline", "expert", "replica", "world")
        },
        "loss": layout.replica * layout.pipeline,
        "model": layout.tensor * layout.pipeline,
        "parts": layout.tensor * layout.expert * layout.pipeline,
        "expert_data": layout.data // layout.expert,
        "expert_replica": layout.replica // layout.expert,
    }
    assert set(sizes) == set(axis_names())
    for axis, size in sizes.items():
        groups = layout.groups(axis)
        assert sorted(r for g in groups for r in g) == list(range(layout.world))
        assert all(len(g) == size and list(g) == sorted(g) for g in groups), axis
        assert list(groups) == sorted(groups)
        assert all(layout.group_of(axis, r) == g for g in groups[:2] + groups[-1:] for r in (g[0], g[-1]))


@LAW
@given(layouts())
def test_an_axis_holds_all_else_fixed(layout):
    for axis in Coords._fields:
        for g in layout.groups(axis):
            places = [layout.coords(r) for r in g]
            assert [getattr(p, axis) for p in places] == list(range(len(g)))
            assert len({p._replace(**{axis: 0}) for p in places}) == 1


@LAW
@given(layouts(), SIZE, SIZE, SIZE, st.booleans())
def test_nested_groups_multiply_to_the_replica(layout, p, gp, og, expert):
    "Hopping over param, grad, optim and copies reaches each rank of the replica exactly once, and the innermost are neighbours"
    axis = "expert_replica" if expert else "replica"
    z = len(layout.groups(axis)[0])
    if z % (p * gp * og):
        with pytest.raises(ValueError, match="each must divide the next"):
            layout.nested(p, p * gp, p * gp * og, expert)
        return
    nested = layout.nested(p, p * gp, p * gp * og, expert)
    assert {name: len(g[0]) for name, g in nested.items()} == {
        "param": p,
        "grad": gp,
        "optim": og,
        "copies": z // (p * gp * og),
    }
    where = {name: {r: g for g in groups for r in g} for name, groups in nested.items()}
    for start in range(0, layout.world, max(1, layout.world // 5)):
        reached = [start]
        for name in nested:
            reached = [r for at in reached for r in where[name][at]]
        members = layout.group_of(axis, start)
        assert sorted(reached) == list(members)
        place = [members.index(r) for r in where["param"][start]]
        assert place == list(range(place[0], place[0] + p)) and place[0] % p == 0


MODEL = ModelConfig(
    "llama",
    vocab_size=64,
    hidden_size=48,
    num_layers=4,
    num_heads=12,
    num_kv_heads=4,
    mlp_ratio=2.0,
    multiple_of=16,
    head_dim_override=4,
)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Layout(0), "world is 0"),
        (
            lambda: Layout(12, tensor=8),
            "world 12 is no multiple of tensor 8 x sequence 1 x context 1 x pipeline 1 = 8: start 16 ranks",
        ),
        (lambda: Layout(8, tensor=4, expert=4), "expert 4 does not divide data 2"),
        (lambda: Layout(8, mode="isp"), "mode is 'isp': choose one of mtp, msp, fsp"),  # type: ignore[arg-type]
        (lambda: Layout(8).coords(8), "rank 8 is not in a world of 8"),
        (lambda: Layout(8).rank_of(Coords(tensor=1)), "tensor coordinate 1 is not in 0..0"),
        (lambda: Layout(8).groups("zero1"), "no axis named 'zero1'"),
        (lambda: Layout(8).nested(2, 2, 16), r"\(2, 2, 16\) of 8 ranks"),
        (lambda: check(Layout(5, tensor=5), MODEL, 40), "num_heads 12 is not divisible by tensor 5"),
        (lambda: check(Layout(6, tensor=6), MODEL, 48), "ffn_size 96|vocab_size 64 is not divisible by tensor 6"),
        (lambda: check(Layout(3, tensor=3), MODEL, 48), "vocab_size 64 is not divisible by tensor 3"),
        (lambda: check(Layout(8, sequence=8), MODEL, 48), "sequence 8 does not divide the 12 heads"),
        (lambda: check(Layout(6, sequence=6), MODEL, 48), "sequence 6 and the 4 key and value heads"),
        (lambda: check(Layout(8, pipeline=8), MODEL, 48), "num_layers 4 is fewer than pipeline 8"),
        (lambda: check(Layout(4, pipeline=4), MODEL, 48, chunks=2), "pipeline 4 x chunks 2 = 8 pieces"),
        (lambda: check(Layout(2, expert=2), MODEL, 48), "expert is 2, but the model has no experts"),
        (
            lambda: check(Layout(4, context=4), MODEL, 20),
            "20 tokens is not divisible by 2 x context 4 = 8: make seq_len a multiple of 8",
        ),
        (
            lambda: check(Layout(4, tensor=4, mode="msp"), MODEL, 21, 2),
            r"42 tokens is not divisible by tensor 4 \(mode msp\) = 4: make seq_len",
        ),
        (lambda: check(Layout(4), MODEL, 48, micro_num=6), "micro_num 6 is not a multiple of data 4.*write 8"),
    ],
)
def test_wrong_sizes_say_what_to_write(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_kv_heads_are_not_replicated():
    model = ModelConfig(
        "llama",
        vocab_size=64,
        hidden_size=48,
        num_layers=1,
        num_heads=12,
        num_kv_heads=2,
        mlp_ratio=2.0,
        multiple_of=16,
        head_dim_override=4,
    )
    with pytest.raises(ValueError, match="num_kv_heads 2 is not divisible by tensor 4"):
        check(Layout(4, tensor=4), model, 48)
    check(Layout(4, sequence=4), model, 48)  # Ulysses repeats them


def test_right_sizes_pass():
    check(Layout(32, tensor=2, sequence=2, context=2, pipeline=2, mode="msp"), MODEL, 48, 1, 4, chunks=2)
    check(Layout(4, tensor=4, mode="mtp"), MODEL, 21, 1, 7)  # tokens are not split in this mode

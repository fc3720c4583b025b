"Slices of a flat buffer: every element in one optimizer slice, slices equal and nested, pieces cover what they are of; any shapes and factors"

from __future__ import annotations

import random
from itertools import pairwise, product
from math import prod

import pytest

from internlm_nb.zero.flat import ShardCoord, lay_out
from internlm_nb.zero.sharding import shardings


@pytest.mark.parametrize("seed", range(60))
def test_slices(seed):
    pick = random.Random(seed)
    z = pick.choice([1, 2, 3, 4, 6, 8, 12])
    sharding = pick.choice(shardings(z))
    shapes = {f"p{i}": tuple(pick.randint(1, 7) for _ in range(pick.randint(0, 3))) for i in range(pick.randint(1, 8))}
    align = pick.choice([1, 2, 16])
    layout = lay_out(shapes, sharding.factors, align)
    p, g, o = sharding.factors
    assert (
        layout.size % (o * align) == 0
        and layout.size < sum(-(-prod(s) // align) * align for s in shapes.values()) + o * align
    )
    assert list(layout.names) == list(shapes) and all(start % align == 0 for start in layout.starts)
    owned: dict[str, list[tuple[int, int]]] = {n: [] for n in shapes}
    covered = []
    for spot in (ShardCoord(*s) for s in product(range(p), range(g // p), range(o // g))):
        whole, middle, own = (layout.slice_of(spot, level) for level in ("param", "grad", "optim"))
        assert whole[0] <= middle[0] <= own[0] and own[1] <= middle[1] <= whole[1]
        assert [b - a for a, b in (whole, middle, own)] == [layout.size // n for n in (p, g, o)]
        covered.append(own)
        for name, first, last, at in layout.pieces(*own):
            assert own[0] <= at < at + last - first <= own[1] and layout.range_of(name)[0] + first == at
            owned[name].append((first, last))
    assert sorted(covered) == [(i * layout.size // o, (i + 1) * layout.size // o) for i in range(o)]
    for name, parts in owned.items():
        parts.sort()
        assert parts[0][0] == 0 and parts[-1][1] == prod(shapes[name]) and all(a[1] == b[0] for a, b in pairwise(parts))

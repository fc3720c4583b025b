"Schedules as data: closed forms of time and memory, PyTorch's own orders, and a check that finds every schedule that would hang or be wrong"

from __future__ import annotations

import random
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest

from internlm_nb.parallel.messages import Do, MessagePlan, check_schedule, follow, plan_messages
from internlm_nb.parallel.schedules import Action, Schedule, ScheduleError, evaluation_schedule, make_schedule
from internlm_nb.parallel.timeline import timeline

RANKS = (1, 2, 3, 4, 5, 8)


def every(ranks: int):
    "All schedules of so many ranks, over numbers of micro-batches around every border"
    for n in sorted({1, 2, ranks - 1, ranks, ranks + 1, 2 * ranks, 2 * ranks + 1, 3 * ranks} - {0}):
        yield make_schedule("1f1b", ranks, n)
        yield make_schedule("zbh1", ranks, n)
        if n % ranks == 0:
            yield from (make_schedule("interleaved", ranks, n, chunks) for chunks in (2, 3))
        if n >= 2 * ranks:
            yield make_schedule("zbv", ranks, n, 2)


@pytest.mark.parametrize("ranks", RANKS)
def test_time_and_memory(ranks):
    for s in every(ranks):
        p, n, v, t = ranks, s.micro_num, s.chunks, timeline(s)
        assert abs(sum(e - b for row in t.spans for _, b, e in row) - 3 * n * v * p) < 1e-9
        near = pytest.approx
        if s.name == "1f1b":
            assert t.bubble == near((p - 1) / (n + p - 1))
            assert t.peaks == tuple(min(n, p - r) for r in range(p))
        if s.name == "interleaved":
            assert t.bubble == near((p - 1) / (v * n + p - 1))
            assert t.peaks == tuple(min(n * v, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p))
        if s.name == "zbh1":
            plain = timeline(make_schedule("1f1b", p, n))
            assert max(t.peaks) <= max(plain.peaks)
            assert t.bubble < plain.bubble or p == 1
            if n >= p:  # (p - 1) (F + I - W), a third of 1F1B's (p - 1) (F + I + W)
                assert t.total == near(3 * n + p - 1)
        if s.name == "zbv":
            assert t.inner_bubble == near(0, abs=1e-12)  # nobody is idle once he has begun
            assert t.total == near(6 * n + p - 1)  # and the last begins after one pass down
            assert max(t.peaks) == 2 * p  # in half-stages: 1F1B's p whole ones
        assert timeline(s, comm=0.1).total >= t.total and timeline(s, kept=0.3).peaks <= t.peaks


@pytest.mark.parametrize("ranks", RANKS)
def test_all_are_whole_and_end(ranks):
    for s in every(ranks):
        for early in (0, 2):
            for one in (s, evaluation_schedule(s, s.micro_num)):
                plan = check_schedule(one, early)
                for program, order in zip(plan.programs, one.orders):
                    assert [do.action for do in program if do.what == "run"] == list(order)
                    out = [d.action for d in program if d.what == "send"]
                    assert len(out) == len(set(out))


@pytest.mark.parametrize("ranks", (2, 3, 4))
def test_an_evaluation_has_little_idle_time(ranks):
    "Any number of packs; full groups of a loop are the forwards of interleaving; the way in and out is all the bubble there is, but for packs that meet at the turn of a V"
    for name, chunks in (("1f1b", 1), ("zbh1", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)):
        like = make_schedule(name, ranks, 2 * ranks, chunks)
        for packs in (*range(1, 10), 12 * ranks):
            s = evaluation_schedule(like, packs)
            plan = check_schedule(s)
            assert plan.window == 4 and strict(plan)
            assert sorted(a.micro for order in s.orders for a in order) == sorted(list(range(packs)) * s.stages)
            total, work = timeline(s).total, packs * chunks
            fewest = max(
                work + ranks - 1, s.stages + packs - 1
            )  # the work and the way in, or the way of one pack and the rest behind it
            assert fewest <= total <= fewest + (name == "zbv") * (ranks - 1), (
                name,
                packs,
                total,
                fewest,
            )  # packs of a V meet at its turn
        if like.shape == "loop":
            forwards = tuple(tuple(a for a in order if a.kind == "F") for order in like.orders)
            assert evaluation_schedule(like, 2 * ranks).orders == forwards


def torch_actions(cls, ranks: int, n: int, chunks: int) -> list[list[tuple[str, int, int]]]:
    "PyTorch's order of actions, from a schedule that is made without stages or processes"
    from torch.distributed.pipelining import schedules as theirs

    made = cls.__new__(cls)
    made.pp_group_size, made.n_local_stages, made._n_microbatches = ranks, chunks, n
    made._num_stages = made.num_stages = ranks * chunks
    if cls is theirs.Schedule1F1B:
        made._num_stages = ranks
        orders = made._get_pipeline_order()
    else:
        if cls in (theirs.ScheduleInterleaved1F1B, theirs.ScheduleInterleavedZeroBubble):
            made.number_of_rounds = max(1, n // ranks)
            made.microbatches_per_round = n // made.number_of_rounds
        orders = {r: made._calculate_single_rank_operations(r) for r in range(ranks)}
    kind = {"FORWARD": "F", "FULL_BACKWARD": "BW", "BACKWARD_INPUT": "B", "BACKWARD_WEIGHT": "W"}
    return [
        [
            (kind[a.computation_type.name], a.microbatch_index, a.stage_index)
            for a in orders[r]
            if a is not None and a.computation_type.name in kind
        ]
        for r in range(ranks)
    ]


@pytest.mark.parametrize("ranks", (2, 3, 4, 8))
def test_second_opinion(ranks):
    "1F1B, interleaved and ZB-V are PyTorch's, action by action; so is ZB-H1, which there is interleaving without a second chunk"
    from torch.distributed.pipelining import schedules as theirs

    for n in (2 * ranks, 3 * ranks, 4 * ranks):
        for name, cls, chunks in (
            ("1f1b", theirs.Schedule1F1B, 1),
            ("interleaved", theirs.ScheduleInterleaved1F1B, 2),
            ("interleaved", theirs.ScheduleInterleaved1F1B, 3),
            ("zbh1", theirs.ScheduleInterleavedZeroBubble, 1),
            ("zbv", theirs.ScheduleZBVZeroBubble, 2),
        ):
            mine = [[tuple(a) for a in order] for order in make_schedule(name, ranks, n, chunks).orders]
            orders = torch_actions(cls, ranks, n, chunks)
            if name == "1f1b":  # this table, not what PyTorch runs, counts the last rank's forwards from 1
                assert orders[-1][0] == ("F", 1, ranks - 1)
                mine, orders = mine[:-1], orders[:-1]
            assert mine == orders, (name, ranks, n)


def oracle(s: Schedule) -> bool:
    "Is a schedule right? Said another way than the check says it: the same actions as a good one, and no cycle among needs and orders"
    for rank, order in enumerate(s.orders):
        want = {
            Action(k, m, st)
            for st in s.stages_of(rank)
            for m in range(s.micro_num)
            for k in (("F", "B", "W") if s.split else ("F", "BW"))
        }
        if set(order) != want or len(order) != len(want):
            return False
    back = "B" if s.split else "BW"
    graph: dict[Action, set[Action]] = {}
    for order in s.orders:
        for before, action in zip((None, *order), order):
            k, m, st = action
            needs = {before} if before else set()
            if k == "F" and st:
                needs.add(Action("F", m, st - 1))
            if k == "W":
                needs.add(Action("B", m, st))
            if k == back:
                needs |= {Action("F", m, st)} | ({Action(back, m, st + 1)} if st < s.stages - 1 else set())
            graph[action] = needs  # type: ignore[assignment]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return False
    return True


def mutate(s: Schedule, rng: random.Random) -> tuple[str, Schedule]:
    "One thing wrong, perhaps"
    orders = [list(order) for order in s.orders]
    r = rng.randrange(s.ranks)
    order, i = orders[r], rng.randrange(len(orders[r]))
    how = rng.choice(("swap", "swap", "swap near", "move", "drop", "double", "other rank", "kind", "micro", "stage"))
    if how in ("swap", "swap near"):
        j = min(i + 1, len(order) - 1) if how == "swap near" else rng.randrange(len(order))
        order[i], order[j] = order[j], order[i]
    elif how == "move":
        order.insert(rng.randrange(len(order)), order.pop(i))
    elif how == "drop":
        order.pop(i)
    elif how == "double":
        order.insert(rng.randrange(len(order)), order[i])
    elif how == "other rank":
        orders[rng.randrange(s.ranks)].append(order.pop(i))
    elif how == "kind":
        order[i] = order[i]._replace(kind=rng.choice(("F", "B", "W", "BW")))
    elif how == "micro":
        order[i] = order[i]._replace(micro=rng.randrange(-1, s.micro_num + 1))
    else:
        order[i] = order[i]._replace(stage=rng.randrange(-1, s.stages + 1))
    return how, replace(s, orders=tuple(map(tuple, orders)))


def test_the_check_finds_every_mutant():
    "A mutant is refused exactly if it is wrong; the message says where"
    rng, seen = random.Random(0), {True: 0, False: 0}
    pool = [
        s for ranks in (1, 2, 3, 4) for s in every(ranks) if 1 < s.micro_num <= 2 * ranks + 1
    ]  # without its only backward, a schedule is one for evaluation
    for _ in range(3000):
        s = rng.choice(pool)
        how, bad = mutate(s, rng)
        right = oracle(bad)
        seen[right] += 1
        if right:
            check_schedule(bad)
        else:
            with pytest.raises(ScheduleError, match=rf"schedule {s.name}(: | never ends: )") as error:
                check_schedule(bad)
            assert "rank" in str(error.value) or "micro-batches of a stage have a backward" in str(error.value), how
    assert min(seen.values()) > 200, seen


def strict(plan: MessagePlan) -> bool:
    "Another model of the network than `follow`: a message moves when both ends have launched all that is before it in their queues, and these have moved"
    at, queues, moved, have = [0] * plan.schedule.ranks, [[] for _ in plan.programs], set(), set()
    s = plan.schedule
    going = True
    while going:
        going = False
        for r, program in enumerate(plan.programs):
            if at[r] == len(program):
                continue
            what, a = program[at[r]]
            if what == "run":
                made = a._replace(kind="B") if a.kind == "BW" else a
                needs = {"F": [(0, -1)] if a.stage else [], "W": []}.get(
                    a.kind, [(1, 1)] if a.stage < s.stages - 1 else []
                )
                ready = all((Action("F" if far < 0 else "B", a.micro, a.stage + far), r) in have for _, far in needs)
                if not ready:
                    continue
                have.add((made, r))
            elif what == "send":
                if (a, r) not in have:
                    return False
                if plan.window and sum(way == "out" for _, _, way in queues[r]) >= plan.window:
                    continue
                queues[r].append((a, s.rank_of(a.stage + (1 if a.kind == "F" else -1)), "out"))
            else:
                queues[r].append((a, s.rank_of(a.stage), "in"))
            at[r] += 1
            going = True
        for r, queue in enumerate(queues):
            if queue and queue[0][2] == "out":
                a, to, _ = queue[0]
                if queues[to] and queues[to][0] == (a, r, "in"):
                    queue.pop(0), queues[to].pop(0)
                    have.add((a, to))
                    moved.add(a)
                    going = True
    return all(i == len(p) for i, p in zip(at, plan.programs)) and not any(queues)


def test_messages_in_another_order_are_found():
    "Of plans with two of a rank's messages or actions changed about, those that hang in the strictest network are refused, and no others"
    rng, seen = random.Random(1), {True: 0, False: 0}
    plans = [
        replace(plan_messages(s), window=w)
        for ranks in (2, 3, 4)
        for s in every(ranks)
        if s.micro_num <= 2 * ranks
        for w in (None, 1, 2)
    ]
    for _ in range(1500):
        plan = rng.choice(plans)
        programs: list[list[Do]] = [list(p) for p in plan.programs]
        program = programs[rng.randrange(len(programs))]
        messages = [i for i, do in enumerate(program) if do.what != "run"]
        if len(messages) < 2:
            continue
        match rng.randrange(3):
            case 0:
                i, j = rng.sample(messages, 2)
                program[i], program[j] = program[j], program[i]
            case 1:
                program.pop(rng.choice(messages))
            case _:
                program.insert(rng.randrange(len(program)), program.pop(rng.choice(messages)))
        bad = replace(plan, programs=tuple(map(tuple, programs)))
        right = strict(bad)
        seen[right] += 1
        if right:
            follow(bad)
        else:
            with pytest.raises(ScheduleError, match=r"never ends|before it has it"):
                follow(bad)
    assert min(seen.values()) > 40, seen


@pytest.mark.parametrize(
    "name, ranks, n, chunks, words",
    [
        ("gpipe", 2, 4, 1, "choose one of 1f1b, interleaved, zbh1, zbv"),
        ("1f1b", 2, 4, 2, "write chunks 1, or schedule interleaved"),
        ("interleaved", 2, 4, 1, "write chunks 2 or more, or schedule 1f1b"),
        ("interleaved", 4, 6, 2, "micro_num 6 is not a multiple of the pipeline's 4 ranks.*write 8"),
        ("zbv", 2, 4, 3, "write chunks 2"),
        ("zbv", 4, 7, 2, "micro_num 7 is fewer than 2 x 4 ranks.*write 8 or more"),
        ("zbh1", 0, 4, 1, "pipeline is 0: it must be a positive integer"),
    ],
)
def test_what_does_not_fit_is_named(name, ranks, n, chunks, words):
    with pytest.raises(ValueError, match=words):
        make_schedule(name, ranks, n, chunks)


def test_plot_says_bubble_and_peak():
    from internlm_nb.parallel.timeline import plot_schedule

    ax = plot_schedule(make_schedule("zbv", 4, 8, 2))
    assert ax.get_title() == "zbv: bubble 6 %, peak 4 micro-batches"
    assert len(ax.patches) == 4 * 8 * 2 * 3

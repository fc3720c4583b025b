"Collectives on real processes: results, gradients, counts, compilation, and what is said when a rank does not come"

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internlm_nb.parallel import comm, mappings
from internlm_nb.parallel.comm import Axis, CollectiveTimeout
from internlm_nb.parallel.layout import Layout, axis_names
from internlm_nb.parallel.mesh import Mesh, Place, destroy, find_place, init_distributed, make_mesh, single
from internlm_nb.parallel.ranks import RankError, run_ranks
from internlm_nb.parallel.record import Recorder, sent_bytes


def heard(axis: Axis, events: bool = True) -> Recorder:
    "Let a fresh recorder hear an axis of a mesh that was made without one"
    object.__setattr__(axis, "recorder", Recorder(events))
    assert axis.recorder is not None
    return axis.recorder


def values(n: int, coord: int, *shape: int, dtype=torch.float64) -> Tensor:
    "The same numbers on every rank for the same (n, coord)"
    return torch.randn(n, *shape, dtype=dtype, generator=torch.Generator().manual_seed(coord))


# results


def results(mesh: Mesh) -> None:
    axis = mesh.axis("data")
    n, me = axis.size, axis.coord
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        every = [(10 * values(2 * n, c, 3)).to(dtype) for c in range(n)]
        mine, total = every[me], torch.stack(every).sum(0)
        close = (
            dict(rtol=0, atol=0)
            if dtype == torch.int64
            else dict(
                rtol=2**-7 * n if dtype == torch.bfloat16 else 1e-6, atol=0.5 if dtype == torch.bfloat16 else 1e-5
            )
        )
        before = mine.clone()
        torch.testing.assert_close(comm.all_reduce(mine, axis, "t"), total, **close)
        assert torch.equal(mine, before), "the input was written"
        assert torch.equal(comm.all_reduce(mine, axis, "t", op="max"), torch.stack(every).amax(0))
        assert torch.equal(comm.all_gather(mine, axis, "t"), torch.cat(every))
        assert torch.equal(comm.all_gather(mine, axis, "t", dim=1), torch.cat(every, 1))
        torch.testing.assert_close(comm.reduce_scatter(mine, axis, "t"), total[2 * me : 2 * me + 2], **close)
        square = torch.cat([mine] * n, 1).t().contiguous()  # (3 n, 2 n): cut along dim 1
        torch.testing.assert_close(
            comm.reduce_scatter(square, axis, "t", dim=1),
            torch.cat([total] * n, 1).t()[:, 2 * me : 2 * me + 2],
            **close,
        )
        assert torch.equal(comm.all_to_all(mine, axis, "t"), torch.cat([e[2 * me : 2 * me + 2] for e in every]))
        copy = mine.clone()
        assert comm.broadcast(copy, axis, "t", source=n - 1) is copy and torch.equal(copy, every[-1])
        assert torch.equal(comm.part(mine, axis), mine[2 * me : 2 * me + 2])
    transposed = torch.arange(6.0).view(2, 3).t()  # not contiguous
    assert torch.equal(comm.all_reduce(transposed, axis, "t"), n * transposed)
    assert torch.equal(comm.all_gather(transposed, axis, "t"), torch.cat([transposed] * n))
    # uneven: rank a sends a + b + 1 rows to rank b, except that rank 0 sends nothing to rank 1
    count = [[0 if (a, b) == (0, 1) else a + b + 1 for b in range(n)] for a in range(n)]
    rows = torch.cat([torch.full((count[me][b], 2), 10.0 * me + b) for b in range(n)])
    got = comm.all_to_all(rows, axis, "t", count[me], [count[a][me] for a in range(n)])
    assert torch.equal(got, torch.cat([torch.full((count[a][me], 2), 10.0 * a + me) for a in range(n)]))
    # agreement of hosts
    assert (
        comm.all_reduce_number(me, axis, "t") == n - 1
        and comm.all_reduce_number(0.5, axis, "t", "sum") == n / 2
        and comm.all_reduce_number(True, axis, "t", "min") is True
    )
    comm.barrier(axis, "t")
    # errors are raised before anything is sent, so the group stays whole
    for call, words in [
        (
            lambda: comm.reduce_scatter(torch.ones(n + 1), axis, "t"),
            f"size {n + 1} is not divisible by the data axis of size {n}",
        ),
        (lambda: comm.all_to_all(torch.ones(n + 1), axis, "t"), "not divisible"),
        (lambda: comm.all_to_all(torch.ones(n), axis, "t", send=[1] * n), "both send and receive"),
        (lambda: comm.all_to_all(torch.ones(n), axis, "t", [1] * (n - 1) + [2], [1] * n), "sum to"),
        (lambda: comm.all_reduce(torch.ones(n), axis, "t", op="mean"), "choose sum, avg, max or min"),
        (lambda: mappings.all_to_all_dims(torch.ones(n, n + 1), axis, "t", split=1, join=0), "not divisible"),
        (lambda: mesh.axis("zero"), "no axis named 'zero'"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(RuntimeError, match="all_reduce has no gradient: use one of the pairs"):
        comm.all_reduce(torch.ones(2, requires_grad=True), axis, "t")
    mesh.check_waited()


@pytest.mark.parametrize("world", [2, 3])
def test_results(world):
    run_ranks(results, Layout(world))


def sums_in_float32(mesh: Mesh) -> tuple[float, float]:
    axis = mesh.axis("data")
    every = [values(4096, c).bfloat16() for c in range(axis.size)]
    exact = torch.stack(every).double().sum(0)
    plain = comm.all_reduce(every[axis.coord], axis, "t")
    wide = comm.all_reduce(every[axis.coord], axis, "t", dtype=torch.float32)
    assert wide.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(
        wide, exact.float().bfloat16()
    )  # four bfloat16 numbers sum in float32 with one rounding less than shows in bfloat16
    return (plain.double() - exact).abs().max().item(), (wide.double() - exact).abs().max().item()


def test_sums_in_float32_round_once():
    plain, wide = run_ranks(sums_in_float32, Layout(4))[0]
    assert wide <= 2**-9 * 8 < 2 * plain  # half a unit in the last place of numbers below 8


# gradients against one process, in float64


def gradients(mesh: Mesh) -> None:
    axis = mesh.axis("tensor")
    n, me = axis.size, axis.coord
    x0, w0 = values(2 * n, 100, 4), values(4, 101, 3 * n)  # rows are the sequence; columns are split over ranks
    v0, c0 = values(3 * n, 102, 5), values(2 * n, 103, 5)  # second matrix; the loss's coefficients
    x, w, v = (t.clone().requires_grad_() for t in (x0, w0, v0))
    loss = ((x.sin() @ w).tanh() @ v * c0).sum()
    loss.backward()
    assert x.grad is not None and w.grad is not None and v.grad is not None
    cols, rows = slice(3 * me, 3 * me + 3), slice(2 * me, 2 * me + 2)

    def compare(x_mine: Tensor, w_mine: Tensor, v_mine: Tensor, value: Tensor, whole: Tensor, x_grad: Tensor) -> None:
        value.backward()
        torch.testing.assert_close(whole.detach(), loss.detach(), rtol=1e-13, atol=1e-13)
        for have, want in ((x_mine.grad, x_grad), (w_mine.grad, w.grad[:, cols]), (v_mine.grad, v.grad[cols])):  # type: ignore[index]
            torch.testing.assert_close(
                have, want, rtol=1e-12, atol=1e-13
            )  # sums in another order, a few units of 2e-16

    # replicated activations: copy_to ... reduce_from
    a, b, c = x0.clone().requires_grad_(), w0[:, cols].clone().requires_grad_(), v0[cols].clone().requires_grad_()
    y = mappings.reduce_from((mappings.copy_to(a.sin(), axis, "x") @ b).tanh() @ c, axis, "y")
    value = (y * c0).sum()
    compare(a, b, c, value, value, x.grad)
    # split by sequence: gather_from_sequence ... scatter_to_sequence; each rank sees its rows of the loss
    for dim in (0, 1):  # the sequence as dim 0, and as dim 1
        a, b, c = (
            x0[rows].clone().requires_grad_(),
            w0[:, cols].clone().requires_grad_(),
            v0[cols].clone().requires_grad_(),
        )
        turn = (lambda t: t.transpose(0, 1).contiguous()) if dim else (lambda t: t)
        full = turn(mappings.gather_from_sequence(turn(a.sin()), axis, "x", dim))
        y = turn(mappings.scatter_to_sequence(turn((full @ b).tanh() @ c), axis, "y", dim))
        value = (y * c0[rows]).sum()
        compare(a, b, c, value, comm.all_reduce(value.detach(), axis, "loss"), x.grad[rows])
    # in and out of a split: split_to ... gather_to
    a = x0.clone().requires_grad_()
    y = mappings.gather_to(mappings.split_to(a.sin(), axis, "x", 0).exp(), axis, "y", 0)
    one = x0.clone().requires_grad_()
    (y * x0).sum().backward()
    (one.sin().exp() * x0).sum().backward()
    torch.testing.assert_close(a.grad, one.grad, rtol=1e-14, atol=0)
    # heads and sequence change places, and back
    whole = values(2 * n, 7, 2 * n, 3)  # (sequence, heads, width)
    a, one = whole[rows].clone().requires_grad_(), whole.clone().requires_grad_()
    heads = mappings.all_to_all_dims(a, axis, "heads", split=1, join=0)
    assert torch.equal(heads, whole[:, rows])
    y = mappings.all_to_all_dims(heads.cumsum(0), axis, "sequence", split=0, join=1)
    (y.sin() * whole[rows]).sum().backward()
    (one.cumsum(0).sin() * whole).sum().backward()
    torch.testing.assert_close(a.grad, one.grad[rows], rtol=1e-13, atol=1e-13)  # type: ignore[index]
    # an uneven exchange, and its way back
    count = [[a + 2 * b for b in range(n)] for a in range(n)]
    a = torch.arange(float(sum(count[me]))).double().requires_grad_()
    send, receive = count[me], [count[r][me] for r in range(n)]
    got = comm.all_to_all(a, axis, "tokens", send, receive)
    assert a.grad is None and len(got) == sum(receive)
    (got * (me + 1)).sum().backward()
    assert a.grad is not None and a.grad.tolist() == [b + 1 for b in range(n) for _ in range(send[b])]


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_equal_those_of_one_process(world):
    run_ranks(gradients, Layout(world, tensor=world))


# handles


def handles(mesh: Mesh) -> None:
    axis = mesh.axis("data")
    n, me = axis.size, axis.coord
    recorder = heard(axis)
    mesh.at_step(3)
    out = torch.empty(2 * n)
    gather = comm.start_all_gather(torch.full((2,), float(me)), axis, "weights", out=out)
    part = torch.empty(2)
    scatter = comm.start_reduce_scatter(torch.arange(2.0 * n), axis, "gradients", out=part)
    with pytest.raises(
        RuntimeError,
        match="never waited for: all_gather over data for 'weights', reduce_scatter over data for 'gradients'",
    ):
        mesh.check_waited()
    assert (
        gather.wait() is out and gather.wait() is out and torch.equal(out, torch.arange(float(n)).repeat_interleave(2))
    )
    assert scatter.wait() is part and torch.equal(part, n * torch.arange(2.0 * n)[2 * me : 2 * me + 2])
    mesh.check_waited()
    assert [(e.kind, e.call.purpose, e.call.step) for e in recorder.events] == [
        (k, p, 3) for k in ("launch", "wait") for p in ("weights", "gradients")
    ]
    total = torch.ones(3)
    assert comm.start_all_reduce(total, axis, "norm").wait() is total and total.tolist() == [n] * 3
    # messages around a ring, both directions in one batch
    sends = [(torch.full((3,), float(me)), (me + 1) % n), (torch.full((1,), -float(me)), (me - 1) % n)]
    if n == 2:  # two messages to one peer arrive in the order of sending
        receives = [(torch.empty(3), 1 - me), (torch.empty(1), 1 - me)]
    else:
        receives = [(torch.empty(3), (me - 1) % n), (torch.empty(1), (me + 1) % n)]
    ahead, back = comm.start_send_receive(sends, receives, axis, "ring").wait()
    assert ahead.tolist() == [(me - 1) % n] * 3 and back.tolist() == [-float((me + 1) % n)]
    assert recorder.total(purpose="ring").sent_bytes == 16
    # a dropped handle
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comm.start_all_reduce(torch.ones(1), axis, "lost")
    assert "all_reduce over data for 'lost' was dropped without wait()" in str(caught[0].message)
    with pytest.raises(RuntimeError, match="'lost'"):
        mesh.check_waited()


def late_message(mesh: Mesh) -> None:
    "Whoever waits for a message longer than a slice still gets it, whether he sends or receives"
    axis = mesh.axis("data")
    x, out = (
        torch.arange(2**20),
        torch.empty(2**20, dtype=torch.int64),
    )  # more than a socket's buffer: sending waits too
    for late in (0, 1):
        if axis.coord == late:
            time.sleep(1.2)
        (got,) = comm.start_send_receive(
            [(x + axis.coord, 1 - axis.coord)], [(out, 1 - axis.coord)], axis, "late"
        ).wait()
        assert torch.equal(got, x + 1 - axis.coord)
    first = comm.start_send_receive(
        [(x, 1)] if axis.coord == 0 else [], [(out, 0)] if axis.coord == 1 else [], axis, "one way"
    )
    first.wait()
    handle = comm.start_all_reduce(x, axis, "count")
    assert handle._call is not None and handle._call.number == 1, "messages do not shift the collectives' numbers"
    handle.wait()


def test_a_late_message_arrives():
    run_ranks(late_message, Layout(2))


def test_handles():
    run_ranks(handles, Layout(2))
    run_ranks(handles, Layout(3))


# compiled


def compiled(mesh: Mesh) -> None:
    axis, n = mesh.axis("tensor"), mesh.axis("tensor").size
    lone = mesh.axis("data")
    recorder = heard(axis)

    def block(x: Tensor, w: Tensor) -> Tensor:
        y = mappings.reduce_from((mappings.copy_to(x, axis, "x") @ w).tanh(), axis, "y")
        y = mappings.scatter_to_sequence(mappings.gather_from_sequence(y, axis, "g").sin(), axis, "s")
        y = mappings.all_to_all_dims(y, axis, "u", split=1, join=0)
        y = comm.all_to_all(mappings.copy_to(y, lone, "nothing"), axis, "a")
        return mappings.gather_to(mappings.split_to(y, axis, "p"), axis, "q").square().sum()

    def run(fn):
        x, w = values(2 * n, 1, 4).requires_grad_(), values(4, axis.coord, 2 * n).requires_grad_()
        recorder.reset()
        value = fn(x, w)
        value.backward()
        return value.detach(), x.grad, w.grad, {k: (c.calls, c.sent_bytes) for k, c in recorder.counts.items()}

    want = run(block)
    graph = torch.compile(block, fullgraph=True, backend="aot_eager")
    run(graph)
    got = run(graph)
    for a, b in zip(want[:3], got[:3]):
        assert torch.equal(a, b)  # the same kernels on the same numbers
    assert want[3] == got[3] and len(want[3]) == 12

    def update(x: Tensor) -> Tensor:
        return comm.all_reduce_(x * 2, axis, "in place") + comm.all_reduce(x, axis, "max", "max")

    x = values(3, axis.coord)
    assert torch.equal(torch.compile(update, fullgraph=True, backend="aot_eager")(x), update(x))


def test_compiled_graphs_keep_collectives_and_counts():
    run_ranks(compiled, Layout(2, tensor=2))


@pytest.mark.slow
def test_compiled_by_inductor():
    run_ranks(inductor, Layout(2, tensor=2), timeout=300)


def inductor(mesh: Mesh) -> None:
    axis = mesh.axis("tensor")

    def block(x: Tensor, w: Tensor) -> Tensor:
        y = mappings.gather_from_sequence((mappings.copy_to(x, axis, "x") @ w).tanh(), axis, "g")
        return (
            comm.all_reduce_(mappings.reduce_from(y * 2, axis, "y").detach() + 1, axis, "in place").sum()
            + mappings.scatter_to_sequence(y, axis, "s").square().sum()
        )

    grads = []
    for fn in (block, torch.compile(block, fullgraph=True)):
        x, w = values(4, 1, 4).requires_grad_(), values(4, axis.coord, 4).requires_grad_()
        fn(x, w).backward()
        grads.append((x.grad, w.grad))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # fused kernels round elsewhere


# counts


@pytest.fixture
def fake_world():
    made = []

    def make(layout: Layout, rank: int, recorder: Recorder | None = None) -> Mesh:
        init_distributed("fake", place=Place(rank, layout.world, 0))
        made.append(1)
        return make_mesh(layout, recorder=recorder)

    yield make
    if made:
        destroy()


def step(mesh: Mesh) -> dict:
    "Every counted collective once; returns bytes by closed form"
    t, d = mesh.axis("tensor"), mesh.axis("data")
    x = torch.zeros(8 * d.size * t.size, 4, dtype=torch.bfloat16)
    for _ in range(2):  # twice the same: a cache of fake operators must not hide the second
        comm.all_reduce(x, t, "a")
        comm.all_gather(x, d, "b")
        comm.reduce_scatter(x, d, "c")
        comm.all_to_all(x, t, "d")
    comm.start_all_gather(x, d, "e").wait()
    comm.all_to_all(x, t, "f", [0] * (t.size - 1) + [len(x)], [5] * t.size)
    whole = x.numel() * 2
    return {
        ("tensor", "a", "all_reduce"): (2, 2 * 2 * whole * (t.size - 1) // t.size),
        ("data", "b", "all_gather"): (2, 2 * whole * (d.size - 1)),  # x is a part
        ("data", "c", "reduce_scatter"): (2, 2 * whole * (d.size - 1) // d.size),
        ("tensor", "d", "all_to_all"): (2, 2 * whole * (t.size - 1) // t.size),
        ("data", "e", "all_gather"): (1, whole * (d.size - 1)),
        ("tensor", "f", "all_to_all"): (1, 0 if t.coord == t.size - 1 else whole),
    }


def counted(recorder: Recorder) -> dict:
    return {k: (c.calls, c.sent_bytes) for k, c in recorder.counts.items()}


@pytest.mark.parametrize("fake_tensors", [False, True])
def test_a_world_that_is_not_there(fake_world, fake_tensors):
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder, start = Recorder(events=True), time.perf_counter()
    layout = Layout(1024, tensor=8, sequence=2, context=2, pipeline=4)
    mesh = fake_world(layout, 513, recorder)
    nested = mesh.nested(8, 8, 32)
    assert time.perf_counter() - start < 5  # about one second alone; other work may share the cores
    assert [a.size for a in nested] == [8, 1, 4, 1]
    assert {name: mesh.axis(name).ranks for name in axis_names()} == {
        name: layout.group_of(name, 513) for name in axis_names()
    }
    assert (
        mesh.axis("data").group is mesh.axis("expert_data").group and nested.copies.group is None
    )  # equal members, one group
    if fake_tensors:
        with FakeTensorMode():
            want = step(mesh)
    else:
        want = step(mesh)
    assert counted(recorder) == want
    assert [e.kind for e in recorder.events] == ["launch", "wait"] * 10


def real_counts(mesh: Mesh) -> None:
    recorder = Recorder()
    for name in ("tensor", "data"):
        object.__setattr__(mesh.axis(name), "recorder", recorder)
    assert mesh.axis("tensor").size == mesh.axis("data").size == 2
    t, d = mesh.axis("tensor"), mesh.axis("data")
    x = torch.zeros(32, 4, dtype=torch.bfloat16)
    comm.all_reduce(x, t, "a")
    comm.all_gather(x, d, "b")
    comm.all_to_all(x, t, "f", [30, 2], [30, 30] if t.coord == 0 else [2, 2])
    assert counted(recorder) == {
        ("tensor", "a", "all_reduce"): (1, 256),
        ("data", "b", "all_gather"): (1, 256),
        ("tensor", "f", "all_to_all"): (1, 16 if t.coord == 0 else 240),
    }


def test_counts_of_real_ranks():
    run_ranks(real_counts, Layout(4, tensor=2))


def test_bytes_round_up():
    assert (
        sent_bytes("all_reduce", 10, 3) == 14
        and sent_bytes("all_gather", 12, 4) == 9
        and sent_bytes("send", 10, 3) == 10
        and sent_bytes("all_gather", 10, 1) == 0
    )


def test_labels_for_the_profiler(fake_world):
    axis = fake_world(Layout(4), 0).axis("data")
    with torch.profiler.profile() as prof:
        comm.all_reduce(torch.ones(4), axis, "gradients")
    assert "all_reduce data gradients" in {e.key for e in prof.key_averages()}


# one process


def test_one_process_has_no_groups_and_no_calls():
    recorder = Recorder(events=True)
    mesh = single(recorder=recorder)
    assert not dist.is_initialized() and {mesh.axis(name).size for name in axis_names()} == {1}
    axis, x = mesh.axis("tensor"), torch.ones(4, 2, requires_grad=True)
    for same in (
        comm.all_reduce(x, axis, "t"),
        comm.all_reduce_(x, axis, "t"),
        comm.all_gather(x, axis, "t", 1),
        comm.reduce_scatter(x, axis, "t"),
        comm.all_to_all(x, axis, "t"),
        comm.broadcast(x, axis, "t"),
        comm.start_all_gather(x, axis, "t").wait(),
        mappings.copy_to(x, axis, "t"),
        mappings.all_to_all_dims(x, axis, "t", 0, 1),
        mappings.gather_from_sequence(x, axis, "t"),
    ):
        assert same is x
    out = torch.zeros(4)
    assert comm.start_reduce_scatter(torch.ones(4), axis, "t", out=out).wait() is out and out.tolist() == [1.0] * 4
    assert comm.all_reduce_number(3, axis, "t") == 3
    assert [a.size for a in mesh.nested(1, 1, 1)] == [1] * 4
    assert not recorder.events and not recorder.counts
    assert make_mesh(Layout(1)).axis("data").group is None


# a rank that does not come


def sleeper(mesh: Mesh) -> str:
    axis = mesh.axis("data")
    mesh.at_step(7)
    comm.all_reduce(torch.ones(2), axis, "warm-up")
    if axis.coord == 2:
        time.sleep(4.5)
        return ""
    try:
        if axis.coord == 3:
            comm.all_gather(torch.ones(2), axis, "weights")
        else:
            comm.all_reduce(torch.ones(2), axis, "gradients")
    except CollectiveTimeout as e:
        time.sleep(4.5 - 3.2)
        return str(e)
    raise AssertionError("finished without rank 2")


def watched(fn):
    "Run in a group that nobody has to leave in order: the last barrier would fail on a broken group"

    def body(mesh: Mesh) -> str:
        return fn(make_mesh(mesh.layout, timeout=2.0))

    return body


def test_a_time_out_names_who_is_missing():
    said = run_ranks(watched(sleeper), Layout(4), timeout=30)
    for rank in (0, 1):
        assert (
            "all_reduce over the data axis (ranks 0, 1, 2, 3) for 'gradients' did not finish at step 7, number 2"
            in said[rank]
        )
        assert (
            "rank 2 has not arrived" in said[rank]
            and "rank 3 waits in the all_gather over data for 'weights' (step 7) instead" in said[rank]
        )
        assert "Arrived: 0, 1." in said[rank]
    assert "all_gather over the data axis" in said[3] and "rank 0 waits in the all_reduce" in said[3]


def mortal(mesh: Mesh) -> None:
    axis = mesh.axis("data")
    comm.all_reduce(torch.ones(2), axis, "warm-up")
    if axis.coord == 1:
        os._exit(9)
    comm.all_reduce(torch.ones(2), axis, "gradients")


def test_a_dead_rank_is_named():
    with pytest.raises(
        RankError,
        match=r"(?s)rank 1 died without a word \(exit code 9\).*rank [02] then: .*'gradients' did not finish.*rank 1 has not arrived.*Arrived: 0, 2",
    ) as e:
        run_ranks(mortal, Layout(3), timeout=20)
    assert "died" in str(e.value)


# run_ranks itself


def test_results_and_prints_come_in_order(capsys):
    offset = 10  # a closure

    def work(k: int, extra: int = 0) -> int:
        print("hello", dist.get_rank())
        assert torch.get_num_threads() == 1
        return offset + k + extra + dist.get_rank()

    assert run_ranks(work, 2, 5, extra=100) == [115, 116]
    assert capsys.readouterr().out == "[rank 0] hello 0\n[rank 1] hello 1\n"


def test_the_first_failure_is_shown():
    def work() -> None:
        print("before the fall")
        if dist.get_rank() == 1:
            raise KeyError("that key")
        time.sleep(20)

    start = time.time()
    with pytest.raises(RankError, match=r"(?s)rank 1 failed first.*before the fall.*KeyError: 'that key'"):
        run_ranks(work, 2)
    assert time.time() - start < 15


def test_a_hang_is_ended_and_named():
    def work() -> None:
        if dist.get_rank() == 1:
            time.sleep(60)

    with pytest.raises(RankError, match=r"(?s)ranks \[1\] gave no result within 3 s.*rank 1: .*in work"):
        run_ranks(work, 2, timeout=3)


# launchers


def test_places():
    assert find_place({}) == Place(0, 1, 0)
    assert find_place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "9"}) == Place(5, 8, 1)
    assert find_place({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}) == Place(3, 4, 3)
    with pytest.raises(ValueError, match="RANK set, but not LOCAL_RANK, WORLD_SIZE"):
        find_place({"RANK": "5"})
    with pytest.raises(ValueError, match="this process is alone: start with torchrun --nproc-per-node 8"):
        make_mesh(Layout(8))


def test_a_mesh_of_another_size(fake_world):
    with pytest.raises(ValueError, match="the layout has 4 ranks, but 8 were started"):
        init_distributed("fake", place=Place(0, 8, 0))
        try:
            make_mesh(Layout(4))
        finally:
            destroy()


# who heard what from whom


def exchanged(mesh: Mesh) -> list:
    axis, n = mesh.axis("data"), mesh.axis("data").size
    me, right, left = axis.coord, (axis.coord + 1) % n, (axis.coord - 1) % n
    comm.all_to_all(
        torch.ones(sum(me + b for b in range(n))), axis, "rows", [me + b for b in range(n)], [a + me for a in range(n)]
    )
    sends = [(torch.ones(me + 1), right), (torch.ones(5), left)]
    comm.start_send_receive(sends, [(torch.empty(left + 1), left), (torch.empty(5), right)], axis, "ring").wait()
    if me < 2:  # one way, between two of them
        ends = ([(torch.ones(7), 1)], []) if me == 0 else ([], [(torch.empty(7), 0)])
        comm.start_send_receive(*ends, axis, "one way").wait()
    comm.all_reduce(torch.ones(3), axis, "sum")
    assert mesh.recorder is not None
    return [event.call for event in mesh.recorder.events if event.kind == "launch"]


def test_a_message_is_the_same_at_both_ends():
    "What one rank says it sends to another, the other says it receives; so ranks can be held against each other without a run"
    calls = run_ranks(exchanged, Layout(3), recorder=Recorder(events=True))
    said = [{(call.purpose, m.rank): m for call in mine for m in call.messages} for mine in calls]
    assert not any(call.messages for mine in calls for call in mine if call.op == "all_reduce")
    for rank, messages in enumerate(said):
        for (purpose, other), message in messages.items():
            back = said[other][purpose, rank]
            assert (message.sent_bytes, message.received_bytes) == (back.received_bytes, back.sent_bytes)
    for mine in calls:
        assert all(sum(m.sent_bytes for m in call.messages) == call.sent_bytes for call in mine if call.messages)
    assert said[0]["one way", 1] == (1, 28, 0) and said[1]["one way", 0] == (0, 0, 28) and ("one way", 0) not in said[2]

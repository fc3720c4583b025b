"Ranks that wait for slow work, ranks that stop in the middle of it, collectives in which ranks differ, and what a call of run_ranks opens to the world"

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from internlm_nb.parallel import comm
from internlm_nb.parallel.alive import at_work, wait_for_all
from internlm_nb.parallel.comm import CollectiveTimeout
from internlm_nb.parallel.consensus import RankFailed, raise_together, run_on_all
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.mesh import Mesh, Place, check_in, find_place, init_distributed, make_mesh, single
from internlm_nb.parallel.ranks import RankError, run_ranks
from internlm_nb.parallel.record import Recorder

# slow work


def slow(mesh: Mesh, who: tuple[int, ...]) -> list:
    "Some ranks work three times as long as a collective may take"
    world = make_mesh(mesh.layout, timeout=1.5).axis("world")
    work = lambda: time.sleep(4.5 if mesh.rank in who else 0) or mesh.rank  # noqa: E731
    out = [run_on_all(work, world, "working", only_first=who == (0,))]
    out.append(run_on_all(lambda: "quick", world, "again", quick=True))
    if mesh.rank == 1:
        error = OSError("no")
    else:
        error = None
    try:
        with at_work(world, "writing"):
            time.sleep(3 if mesh.rank == 1 else 0)
        raise_together(error, world, "writing")
    except (OSError, RankFailed) as e:
        out.append(f"{type(e).__name__}: {e}")
    comm.barrier(world, "the group is whole")
    return out


@pytest.mark.parametrize("who", [(0,), (1, 2)])
def test_work_may_take_longer_than_a_collective(who):
    got = run_ranks(slow, Layout(3), who)
    assert [g[0] for g in got] == ([0, None, None] if who == (0,) else [0, 1, 2]) and {g[1] for g in got} == {"quick"}
    assert (
        got[1][2] == "OSError: no" and got[0][2] == got[2][2] == "RankFailed: rank 1 failed while writing: OSError: no"
    )


def ended(mesh: Mesh, how: int, at: int) -> None:
    "Rank `at` is ended or stopped in the middle of its work, after a sign of life or two"
    world = make_mesh(mesh.layout, timeout=2.0).axis("world")
    begin = time.monotonic()

    def work() -> None:
        if mesh.rank == at:
            time.sleep(2.5)
            os.kill(os.getpid(), how)
            time.sleep(60)

    try:
        run_on_all(work, world, "reading a checkpoint")
    except CollectiveTimeout as e:
        assert time.monotonic() - begin < 15  # 2.5 of work, 2 of silence; the rest is a busy machine's
        raise CollectiveTimeout(f"heard: {e}") from None
    raise AssertionError("nobody was missed")


@pytest.mark.parametrize(
    "how, at",
    [
        (signal.SIGKILL, 2),
        (signal.SIGSTOP, 0),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 2, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_ends_in_the_middle_of_its_work_is_named(how, at):
    "A stopped one by the others; a killed one by run_ranks, which sees it end before they miss it"
    if how == signal.SIGKILL:
        with pytest.raises(RankError, match=rf"rank {at} died without a word \(SIGKILL"):
            run_ranks(ended, Layout(3), how, at, timeout=40)
        return
    with pytest.raises(RankError) as e:
        run_ranks(ended, Layout(3), how, at, timeout=40)
    words = f"heard: while reading a checkpoint, over the world axis, ranks were waited for that were silent for 2 s: rank {at} was at work (reading a checkpoint)"
    assert words in str(e.value)


def mourned(mesh: Mesh, folder: str) -> None:
    "Rank 1 is killed; the others write down what they heard, since run_ranks tells of the first end alone"
    try:
        ended(mesh, signal.SIGKILL, 1)
    except CollectiveTimeout as e:
        Path(folder, str(mesh.rank)).write_text(str(e))


def test_survivors_of_a_kill_name_it_within_the_timeout(tmp_path, monkeypatch):
    import internlm_nb.parallel.ranks as ranks

    real = ranks._collect

    def patient(ends, procs, deadline, folder):  # as torchrun without its agent: nobody ends the survivors
        while not all((tmp_path / r).exists() for r in "02") and time.time() < deadline:
            time.sleep(0.1)
        return real(ends, procs, deadline, folder)

    monkeypatch.setattr(ranks, "_collect", patient)
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(mourned, Layout(3), str(tmp_path), timeout=40)
    for r in "02":
        assert (
            "silent for 2 s: rank 1 was at work (reading a checkpoint) and gives no sign of life"
            in (tmp_path / r).read_text()
        )


def never_comes(mesh: Mesh) -> str:
    "Rank 1 worked, and then does something else"
    world = make_mesh(mesh.layout, timeout=2.0).axis("world")
    if mesh.rank == 1:
        with at_work(world, "preparing data"):
            time.sleep(2.5)
        time.sleep(6)  # and then it does not come
        return ""
    try:
        wait_for_all(world, "preparing data")
    except CollectiveTimeout as e:
        return str(e)
    raise AssertionError("came back without rank 1")


def test_who_stops_to_show_life_is_named_within_the_timeout():
    said = run_ranks(never_comes, Layout(2), timeout=40)[0]
    assert "silent for 2 s: rank 1 was at work (preparing data) and gives no sign of life any more" in said


def absent(mesh: Mesh) -> str:
    world = make_mesh(mesh.layout, timeout=1.0).axis("world")
    if mesh.rank == 1:
        time.sleep(4)
        return ""
    try:
        wait_for_all(world, "saving")
    except CollectiveTimeout as e:
        return str(e)
    raise AssertionError("came back without rank 1")


def test_who_never_came_is_named_as_in_a_collective():
    assert "rank 1 has not arrived" in run_ranks(absent, Layout(2), timeout=30)[0]


def test_one_process_waits_for_nobody():
    world = single().axis("world")
    before = threading.active_count()
    with at_work(world, "x"):
        assert threading.active_count() == before
    wait_for_all(world, "x")
    assert run_on_all(lambda: 3, world, "x") == 3 and not dist.is_initialized()
    with pytest.raises(ZeroDivisionError):
        run_on_all(lambda: 1 // 0, world, "x")


def many(mesh: Mesh) -> int:
    "A hundred meetings leave two keys behind, not a hundred"
    world, store = mesh.axis("world"), dist.distributed_c10d._get_default_store()
    before = store.underlying_store.num_keys()
    for _ in range(100):
        wait_for_all(world, "counting")
    comm.barrier(world, "all are through")
    return store.underlying_store.num_keys() - before


def test_meetings_leave_no_keys_behind():
    assert max(run_ranks(many, Layout(2), check=False)) <= 8


# check mode


def differ(mesh: Mesh, how: str) -> None:
    axis, odd = mesh.axis("data"), mesh.rank == 1
    n, me = axis.size, axis.coord
    comm.all_reduce(torch.ones(3), axis, "warm-up")
    if how == "shape":
        comm.all_reduce(torch.ones(5 if odd else 4), axis, "gradients")
    elif how == "transposed":  # as many bytes: nothing would abort, and the sums would be wrong
        comm.all_reduce(torch.ones((2, 6) if odd else (6, 2)), axis, "gradients")
    elif how == "dtype":
        comm.all_gather(torch.ones(4, dtype=torch.int32 if odd else torch.float32), axis, "weights")
    elif how == "reduction":
        comm.reduce_scatter(torch.ones(4 * n), axis, "norm", op="max" if odd else "sum")
    elif how == "op":
        comm.all_gather(torch.ones(4), axis, "x") if odd else comm.all_reduce(torch.ones(4), axis, "x")
    elif how == "purpose":
        comm.all_reduce(torch.ones(4), axis, "the second" if odd else "the first")
    elif how == "count" and not odd:
        comm.all_reduce(torch.ones(4), axis, "only some")
    elif how == "source":
        comm.broadcast(torch.ones(4), axis, "weights", source=int(odd))
    elif how == "rows":
        send = [2] * n
        comm.all_to_all(torch.ones(2 * n), axis, "tokens", send, [3] + [2] * (n - 1) if odd else send)
    elif how == "message":
        sends = [(torch.ones(4 if odd else 3), (me + 1) % n)]
        comm.start_send_receive(sends, [(torch.empty(3), (me - 1) % n)], axis, "ring").wait()
    comm.all_reduce(torch.ones(1), axis, "loss")


@pytest.mark.parametrize(
    "how, words",
    [
        (
            "shape",
            r"collective number 2 of the data axis \(step 0\): rank 0 calls all_reduce for 'gradients' of float32 \(4,\), sum, and rank 1 calls .*\(5,\)",
        ),
        pytest.param("transposed", r"float32 \(6, 2\).*rank 1 calls .*float32 \(2, 6\)", marks=pytest.mark.slow),
        ("dtype", r"float32 \(4,\).*rank 1 calls all_gather for 'weights' of int32 \(4,\)"),
        pytest.param(
            "reduction", r"reduce_scatter for 'norm' of .*, sum, and rank 1 calls .*, max", marks=pytest.mark.slow
        ),
        ("op", r"rank 0 calls all_reduce for 'x'.*rank 1 calls all_gather for 'x'"),
        ("purpose", r"rank 0 calls all_reduce for 'the first'.*rank 1 calls all_reduce for 'the second'"),
        ("count", r"rank 0 calls all_reduce for 'only some'.*rank 1 calls all_reduce for 'loss'"),
        pytest.param("source", r"from 0, and rank 1 calls .*from 1", marks=pytest.mark.slow),
        ("rows", r"rank 0 sends 2 rows to rank 1, which expects 3"),
        ("message", r"message 1 from rank 1 to rank (2|0) over the data axis, 'ring' \(step 0\): .*4 elements"),
    ],
)
def test_what_differs_is_named_before_it_runs(how, words):
    with pytest.raises(RankError, match="(?s)Mismatch: ranks differ at .*" + words) as e:
        run_ranks(differ, Layout(2), how, timeout=30)
    assert "SIGABRT" not in str(e.value)


@pytest.mark.parametrize(
    "how", ["shape", "count", *(pytest.param(how, marks=pytest.mark.slow) for how in ("purpose", "rows"))]
)
def test_of_three_ranks_the_odd_one_is_in_the_message_whoever_comes_first(how):
    with pytest.raises(RankError, match=r"Mismatch: ranks differ at collective number 2 of the data axis.*rank 1") as e:
        run_ranks(differ, Layout(3), how, timeout=30)
    assert "SIGABRT" not in str(e.value)


def many_right(mesh: Mesh) -> dict:
    "Launched in another order over two axes, waited for later, uneven: right, and not complained of"
    t, d = mesh.axis("tensor"), mesh.axis("data")
    n, x = d.size, torch.ones(4)
    pairs = [(t, "over tensor"), (d, "over data")]
    handles = [
        comm.start_all_reduce(torch.ones(4), axis, name) for axis, name in (pairs if mesh.rank % 2 else pairs[::-1])
    ]
    for handle in handles:
        handle.wait()
    rows = torch.cat([torch.full((mesh.coords.data + b + 1,), 1.0) for b in range(n)])
    comm.all_to_all(rows, d, "tokens", [d.coord + b + 1 for b in range(n)], [a + d.coord + 1 for a in range(n)])
    right, left = (d.coord + 1) % n, (d.coord - 1) % n
    for size in (3, 5):
        comm.start_send_receive([(torch.ones(size), right)], [(torch.empty(size), left)], d, "ring").wait()
    comm.start_send_receive(
        [(x, right)] if d.coord == 0 else [], [(torch.empty(4), left)] if d.coord == 1 else [], d, "one way"
    ).wait()
    return {key: count.calls for key, count in mesh.recorder.counts.items()}


def test_what_is_right_passes_and_each_mesh_has_its_recorder():
    want = {
        ("tensor", "over tensor", "all_reduce"): 1,
        ("data", "over data", "all_reduce"): 1,
        ("data", "tokens", "all_to_all"): 1,
        ("data", "ring", "send"): 2,
        ("data", "one way", "send"): 1,
    }
    got = run_ranks(many_right, Layout(4, tensor=2), recorder=Recorder())
    assert [{**g, ("data", "one way", "send"): 1} for g in got] == [want] * 4
    assert run_ranks(lambda mesh: (mesh.check, mesh.recorder), Layout(2), check=False) == [(False, None)] * 2


# how ranks end


@pytest.mark.parametrize("how", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_a_rank_that_a_signal_ends_is_told_with_its_last_words(how):
    def work(how: int) -> None:
        if dist.get_rank() == 1:
            for i in range(30):
                os.write(2, f"line {i} of a library in C\n".encode())
            signal.raise_signal(how) if how != signal.SIGKILL else os.kill(os.getpid(), how)
        dist.barrier()

    with pytest.raises(
        RankError, match=rf"(?s)rank 1 died \({how.name}.*the end of its standard error:\n.*  line 29 of a library in C"
    ) as e:
        run_ranks(work, 2, int(how), timeout=20)
    assert "line 1 of" not in str(e.value) and ("out of memory" in str(e.value)) == (how == signal.SIGKILL)


# who can reach the ranks


def listeners(pids: set[int]) -> set[str]:
    "Addresses at which these processes listen, by the system's own tables"
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(fd))
            except OSError:
                pass
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for row in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])
                found.add(socket.inet_ntop(family, b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))))
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's tables")
def test_nothing_that_ranks_open_is_reached_from_elsewhere():
    def work(mesh: Mesh, parent: int) -> list[str]:
        comm.all_reduce(torch.ones(2), mesh.axis("data"), "connect")
        mesh.nested(1, 1, 2)
        world = mesh.axis("world")
        seen = sorted(listeners({os.getpid(), parent}))
        comm.barrier(world, "all have looked")
        return seen

    assert listeners({os.getpid()}) == set() or "0.0.0.0" not in listeners({os.getpid()})
    assert run_ranks(work, Layout(4, tensor=2), os.getpid()) == [["127.0.0.1"]] * 4


# what launchers say


def test_variables_that_cannot_be_true_are_refused_alone():
    base = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_place(base) == Place(1, 2, 1) and find_place(
        {**base, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}
    ) == Place(1, 8, 1)
    for change, words in [
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "one"}, "RANK is 'one', and should be a number"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, "cannot be true together"),
        ({"LOCAL_RANK": "2"}, "cannot be true together"),
    ]:
        with pytest.raises(ValueError, match=words):
            find_place({**base, **change})


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"])
def test_ranks_that_were_told_other_things_all_learn_it_at_once(name):
    store, said = HashStore(), {}

    def come(rank: int) -> None:
        env = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
        env[name] = "4" if rank == 2 else env.get(name, "3")
        with pytest.raises(ValueError) as e:
            check_in(store, Place(rank, int(env["WORLD_SIZE"]), rank), 60.0, env)
        said[rank] = str(e.value)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    assert set(said) == {0, 1, 2}, "somebody waits for the timeout"
    assert all(f"{name} is " in text and "4 on rank 2" in text for text in said.values())


def _start(code: str, **env: str) -> subprocess.Popen:
    keep = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("RANK", "WORLD", "LOCAL_", "MASTER", "TORCHELASTIC", "SLURM"))
    }
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**keep, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_processes_with_other_world_sizes_end_at_once_and_say_so():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    code = "from internlm_nb.parallel.mesh import init_distributed\ninit_distributed('gloo', 100.0)"
    base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [_start(code, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(2 + r), **base) for r in range(2)]
    said = [p.communicate(timeout=90)[0] for p in ranks]  # 100 s would be the timeout
    assert all("WORLD_SIZE is 2 on rank 0, and 3 on rank 1" in text for text in said), said


def test_a_meeting_place_that_is_none_is_named():
    assert "rank 1 finds nobody at MASTER_ADDR 127.0.0.1, MASTER_PORT 1, where ranks meet" in run_ranks(_nobody, 1)[0]


def _nobody() -> str:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    try:
        init_distributed("gloo", 1.0, Place(1, 2, 1))
    except ValueError as e:
        return str(e)
    return "joined somebody"

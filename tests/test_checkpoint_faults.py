"Whatever happens to a save, a file or the disk: earlier checkpoints stay, half ones are never picked, damage is named"

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from internlm_nb.checkpoint import durable, writer
from internlm_nb.checkpoint.durable import (
    CheckpointError,
    publish,
    remove_folder,
    remove_tree,
    require_space,
    sibling,
    standing,
    sweep,
    write_file,
)
from internlm_nb.checkpoint.index import VERSION, NewerFormat, seal, unseal
from internlm_nb.checkpoint.keep import (
    mark_best,
    newest,
    prune,
    read_best,
    read_stop,
    resolve,
    snapshot_folder,
    snapshots,
    steps,
    to_delete,
)
from internlm_nb.checkpoint.logical import save_state
from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.checkpoint.shards import Shard
from internlm_nb.checkpoint.writer import Writer


def tensors(value, size=5000):
    "Three tensors, all full of one number"
    return {name: torch.full((size,), float(value)) for name in ("model.w", "exp_avg.w", "exp_avg_sq.w")}


def save(path, value, **kwargs):
    "A checkpoint all of whose elements are one number, in a shard per tensor"
    return save_state(path, tensors(value), {"step": int(path.name), "value": value}, shard_bytes=1, **kwargs)


def content(path):
    "The number that a checkpoint is full of; fails when it is a mixture of two or damaged"
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    values = {float(v) for name in checkpoint.names for v in checkpoint.read(name).unique()} | {
        float(checkpoint.state["value"])
    }
    assert len(values) == 1 and len(checkpoint.names) == 3
    return int(values.pop())


def in_child(work, die_at=None):
    "Run work() in a forked process; with die_at, the process dies on the spot before its die_at-th operation on a file's name. True: it came to its end"
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, args):
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                count += 1
                if count == die_at:
                    os._exit(9)

        try:
            sys.addaudithook(hook)
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


def quiet(line):
    "Messages are not looked at"


def at_every_moment(tmp_path, prepare, work, check, least):
    "Let work die before each of its file operations in turn; check the folder after each death"
    for die_at in range(1, 500):
        folder = tmp_path / str(die_at)
        prepare(folder)
        done = in_child(lambda folder=folder: work(folder), die_at)
        check(folder, done)
        sweep(folder)
        check(folder, done)
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        shutil.rmtree(folder)
        if done:
            break
    assert least <= die_at < 499, "the sweep over moments of death saw too few of them"


def test_death_at_any_moment_of_a_new_save(tmp_path):
    def check(folder, done):
        found = newest(folder, verify=True, say=quiet)
        assert found in (folder / "100", folder / "200") and (not done or found == folder / "200")
        assert content(found) == (1 if found == folder / "100" else 2) and content(folder / "100") == 1

    at_every_moment(tmp_path, lambda f: save(f / "100", 1), lambda f: save(f / "200", 2), check, least=10)


def test_death_at_any_moment_of_a_replacement(tmp_path):
    def check(folder, done):
        found = newest(folder, verify=True, say=quiet)
        assert found == folder / "100" and content(found) in ({2} if done else {1, 2})

    at_every_moment(
        tmp_path, lambda f: save(f / "100", 1), lambda f: save(f / "100", 2, overwrite=True), check, least=12
    )


def test_death_at_any_moment_of_pruning(tmp_path):
    def prepare(folder):
        for step in (100, 200, 300):
            save(folder / str(step), step)

    def check(folder, done):
        present = [f.step for f in steps(folder)]
        assert 300 in present and all(content(folder / str(s)) == s for s in present)
        assert not done or present == [300]

    at_every_moment(tmp_path, prepare, lambda f: prune(f, last=1), check, least=8)


def test_a_killed_save_does_not_hinder_the_next(tmp_path):
    for die_at in range(1, 40):
        folder = tmp_path / str(die_at)
        save(folder / "100", 1)
        in_child(lambda folder=folder: save(folder / "200", 2), die_at)
        if not (folder / "200").exists():
            save(folder / "200", 3)  # without a sweep
        assert content(folder / "200") in (2, 3) and sorted(p.name for p in folder.iterdir()) == ["100", "200"]


def test_kill_9_at_random_moments(tmp_path):
    "A process that does nothing but save, replace and prune is killed 40 times and more; what stands is always whole and never older than what it had reported"
    folder, rng = tmp_path / "checkpoints", random.Random(0)
    folder.mkdir()
    first, deaths = 1, 0
    while deaths < 40 or (first <= 20 and deaths < 400):  # on a busy machine a life may be too short for one save
        deaths += 1
        reader, report = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                sweep(folder)
                os.write(report, b"0\n")
                for step in range(first, first + 10_000):
                    save(folder / str(step), step)
                    os.write(report, b"%d\n" % step)
                    save(folder / str(step), step, overwrite=True)
                    prune(folder, last=2)
                    path = snapshot_folder(folder, quiet)
                    save_state(path, tensors(step), {"step": step, "value": step}, overwrite=True)
            finally:
                os._exit(1)
        os.close(report)
        begun = os.read(reader, 2)  # its life counts from here
        assert begun == b"0\n"
        time.sleep(rng.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader) as lines:
            reported = [int(x) for x in lines.read().split()]
        found = newest(folder, verify=True, say=quiet)
        reached = content(found) if found else 0
        assert reached >= max(reported, default=first - 1)
        for f in [*steps(folder), *snapshots(folder, pytest.fail)]:
            assert content(f.path) == f.step
        first = reached + 1
    assert first > 20


# --- the disk ---


def test_every_failing_flush_is_a_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    "A full disk may show itself at any flush"
    save(tmp_path / "100", 1)
    real, calls = os.fsync, 0
    for fail_at in range(1, 50):
        calls = 0

        def fsync(handle, fail_at=fail_at):
            nonlocal calls
            calls += 1
            if calls == fail_at and not os.path.isdir(f"/proc/self/fd/{handle}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            save(tmp_path / "200", 2)
            if calls < fail_at:
                break
            remove_folder(tmp_path / "200")  # a folder's flush, which is not a reason to fail
        except CheckpointError as error:
            assert "200.saving: saving failed (No space left on device); nothing was saved" in str(error)
            assert [p.name for p in tmp_path.iterdir()] == ["100"]
        assert content(tmp_path / "100") == 1
    assert 5 < fail_at < 49


def test_a_file_that_may_not_grow(tmp_path):
    "The kernel refuses the write itself (RLIMIT_FSIZE)"
    save(tmp_path / "100", 1)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match="File too large"):
            save(tmp_path / "200", 2)

    assert in_child(work)
    assert [p.name for p in tmp_path.iterdir()] == ["100"] and content(tmp_path / "100") == 1


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="needs to mount a small disk")
def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        save(disk / "100", 1)  # 60 kB
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_state(disk / "200", tensors(2, 50_000), {"step": 200})
        assert [p.name for p in disk.iterdir()] == ["100"] and content(disk / "100") == 1
        with pytest.raises(CheckpointError, match=r"needs 600 kB and .* has .* kB free"):
            require_space(disk / "200", 600_000)
        with pytest.raises(CheckpointError, match=r"best.json: cannot be written \(No space"):
            write_file(disk / "best.json", b"x" * 300_000)
        save(disk / "200", 2)
        assert content(newest(disk)) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_ctrl_c_while_writing_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path / "100", 1)
    real, calls = writer.write_shard, 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(writer, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "200", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["100"]


def test_a_writer_that_is_left_without_commit_leaves_nothing(tmp_path):
    with Writer(tmp_path / "1") as one:
        one.add("w", torch.zeros(2))
        one.write()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="mine"):
        with Writer(tmp_path / "1", 1, 2) as second:
            second.add("w", torch.zeros(2))
            second.write()
            (second.saving / "rank-00000.json").write_text("of another rank")
            raise RuntimeError("mine")
    assert [p.name for p in sibling(tmp_path / "1", "saving").iterdir()] == ["rank-00000.json"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="saving failed"):
        save(tmp_path / "file" / "100", 1)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_file(tmp_path / "nowhere" / "best.json", "x")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(CheckpointError, match="saving failed"):
            save(tmp_path / "100", 1)
        with pytest.raises(CheckpointError, match="cannot be written"):
            require_space(tmp_path / "100", 1)
        tmp_path.chmod(0o700)


def test_links(tmp_path):
    "checkpoints/ may be a link to another disk; a linked checkpoint is replaced without touching what it points at, and never pruned"
    (tmp_path / "big").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "big")
    save(tmp_path / "checkpoints" / "100", 1)
    assert content(tmp_path / "big" / "100") == 1
    (tmp_path / "big" / "200").symlink_to(tmp_path / "big" / "100")
    with pytest.raises(CheckpointError, match="not overwritten"):
        save(tmp_path / "checkpoints" / "200", 2)
    save(tmp_path / "checkpoints" / "200", 2, overwrite=True)
    assert content(tmp_path / "big" / "200") == 2 and content(tmp_path / "big" / "100") == 1
    (tmp_path / "big" / "50").symlink_to(tmp_path / "big" / "100")
    assert prune(tmp_path / "checkpoints", last=1) == [100] and (tmp_path / "big" / "50").is_symlink()


# --- damage ---


def test_every_flipped_bit_is_an_error_that_names_the_file(tmp_path):
    path = save_state(
        tmp_path / "1",
        {"a": torch.arange(3.0), "b": torch.tensor([True, False])},
        {"step": 1, "text": "é", "small": 1e-5},
    )
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for at in range(len(good)):
            file.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
            with pytest.raises(CheckpointError, match=file.name):  # reading alone finds it, without a call of verify
                checkpoint = Checkpoint(path)
                [checkpoint.read(name) for name in checkpoint.names]
        file.write_bytes(good)


def test_every_truncation_is_named(tmp_path):
    path = save_state(tmp_path / "1", {"a": torch.arange(3.0)}, {"step": 1})
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for size in range(len(good)):
            file.write_bytes(good[:size])
            with pytest.raises(CheckpointError, match=file.name):
                Checkpoint(path)
        file.write_bytes(good)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            Checkpoint(path)
        file.write_bytes(good)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        Checkpoint(tmp_path)


def test_check_false_skips_the_checksum_and_verify_does_not(tmp_path):
    path = save_state(tmp_path / "1", {"a": torch.zeros(3)})
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4] + torch.ones(1).numpy().tobytes())
    assert Checkpoint(path, check=False).read("a").tolist() == [0, 0, 1]
    for check in (True, False):
        with pytest.raises(CheckpointError, match="do not match their checksum"):
            Checkpoint(path, check=check).verify()


def test_ranks_share_the_verification(tmp_path):
    path = save(tmp_path / "1", 1)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    checkpoint = Checkpoint(path)
    for rank in (0, 2):
        checkpoint.verify(rank, 3)
    with pytest.raises(CheckpointError, match=r"rank-00000-00001.*exp_avg\.w"):
        checkpoint.verify(1, 3)


def test_files_that_do_not_belong_together(tmp_path):
    "An index and shards that are each whole, with the same sizes, but of two checkpoints"
    one = save_state(tmp_path / "1", {"a": torch.zeros(2)})
    two = save_state(tmp_path / "2", {"b": torch.zeros(2)})
    shutil.copy(next(two.glob("*.safetensors")), next(one.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=r"1/rank-00000-00000\.safetensors: belongs to another checkpoint"):
        Checkpoint(one).read("a")
    body = json.loads((one / "index.json").read_text())
    facts = json.loads((two / "index.json").read_text())["files"]
    (one / "index.json").write_text(seal({"tensors": body["tensors"], "files": facts, "state": {}}))
    with pytest.raises(CheckpointError, match="has no tensor 'a'"):
        Checkpoint(one).read("a")
    body["tensors"]["b"] = {**body["tensors"].pop("a"), "shape": [3]}
    body["tensors"]["b"]["chunks"][0] |= {"key": "b", "sizes": [3]}
    (one / "index.json").write_text(seal({"tensors": body["tensors"], "files": facts, "state": {}}))
    with pytest.raises(CheckpointError, match=r"b is torch.float32 \(2,\), the index says torch.float32 \(3,\)"):
        Checkpoint(one).read("b")
    body["tensors"]["b"]["chunks"] = []
    (one / "index.json").write_text(seal({"tensors": body["tensors"], "files": facts, "state": {}}))
    with pytest.raises(CheckpointError, match="b: 0 of 3 elements"):
        Checkpoint(one).read("b")
    with pytest.raises(CheckpointError, match="b: not saved by anybody"):
        Checkpoint(one).verify()


def test_a_newer_format_is_never_passed_over(tmp_path):
    "Falling back to an older checkpoint because the library is older would lose work in silence"
    folder = tmp_path / "checkpoints"
    save(folder / "100", 1)
    save(folder / "200", 2)
    (folder / "200" / "index.json").write_text(seal({"version": VERSION + 1, "tensors": {}, "files": {}, "state": {}}))
    for find in (
        lambda: newest(folder, say=quiet),
        lambda: resolve("auto", tmp_path),
        lambda: resolve(folder / "200", tmp_path),
    ):
        with pytest.raises(NewerFormat, match=f"format version {VERSION + 1}.*update internlm_nb"):
            find()
    shutil.copytree(folder / "200", folder / "snapshot" / "0")
    with pytest.raises(NewerFormat):
        snapshots(folder)


def test_what_is_no_index(tmp_path):
    path = tmp_path / "index.json"
    for text in (
        "[]",
        "{}",
        '{"format": "other", "version": 1}',
        '{"format": "internlm_nb.checkpoint", "version": "1"}',
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="is not the index"):
            unseal(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not readable"):
        unseal(path)


def test_a_shard_that_is_none(tmp_path):
    for data in (b"", b"\x01", b"\xff" * 8, (2).to_bytes(8, "little")):
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a\.safetensors: the header is damaged"):
            Shard(tmp_path / "a.safetensors")


# --- choosing ---


def test_nothing_usable_is_an_error_and_not_a_start_at_zero(tmp_path):
    folder = tmp_path / "checkpoints"
    assert resolve("auto", tmp_path) is None
    sibling(folder / "100", "saving").mkdir(parents=True)  # only a first save that was killed: there is nothing to lose
    said = []
    assert resolve("auto", tmp_path, say=said.append) is None and "a save that was not finished" in said[0]
    save(folder / "100", 1)
    (folder / "100" / "index.json").write_text("{")
    (folder / "200").mkdir()
    with pytest.raises(CheckpointError, match="none can be used") as error:
        resolve("auto", tmp_path, say=quiet)
    assert "200 skipped: it has no index.json" in str(error.value) and "not readable as JSON" in str(error.value)
    assert resolve("none", tmp_path) is None


def test_newest_with_checksums_passes_over_damage_that_sizes_do_not_show(tmp_path):
    save(tmp_path / "100", 1)
    save(tmp_path / "200", 2)
    shard = next((tmp_path / "200").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    said = []
    assert newest(tmp_path) == tmp_path / "200"
    assert (
        newest(tmp_path, verify=True, say=said.append) == tmp_path / "100" and "do not match their checksum" in said[0]
    )
    with pytest.raises(CheckpointError, match="do not match"):
        resolve(tmp_path / "200", tmp_path, verify=True)


def test_a_damaged_snapshot_is_replaced_first(tmp_path):
    for step in (10, 20):
        path = snapshot_folder(tmp_path)
        save_state(path, tensors(step), {"step": step, "value": step}, overwrite=True)
    newer = newest(tmp_path)
    assert newer == tmp_path / "snapshot" / "1"
    (newer / "index.json").write_text("{")
    assert newest(tmp_path, say=quiet) == tmp_path / "snapshot" / "0" and snapshot_folder(tmp_path, quiet) == newer
    shutil.rmtree(tmp_path / "snapshot" / "0")
    with pytest.raises(CheckpointError, match="none can be used"):
        newest(tmp_path, say=quiet)


def test_an_interrupted_replacement_counts_everywhere(tmp_path):
    save(tmp_path / "100", 1)
    os.rename(tmp_path / "100", sibling(tmp_path / "100", "old"))
    assert newest(tmp_path) == tmp_path / "100" and content(tmp_path / "100") == 1
    assert resolve(tmp_path / "100", tmp_path) == tmp_path / "100" and [f.step for f in steps(tmp_path)] == [100]
    with pytest.raises(CheckpointError, match="not overwritten"):
        save(tmp_path / "100", 2)
    mark_best(tmp_path, 100, 1.0)
    save(tmp_path / "200", 2)
    assert prune(tmp_path, last=1) == []
    save(tmp_path / "100", 3, overwrite=True)
    assert content(tmp_path / "100") == 3 and not sibling(tmp_path / "100", "old").exists()


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("every", [0, 3, 20])
def test_retention_laws(last, every):
    rng = random.Random(last * 100 + every)
    for _ in range(50):
        present = rng.sample(range(100), rng.randrange(0, 20))
        protect = rng.sample(range(100), 3)
        gone = to_delete(present, last, every, protect)
        stay = set(present) - set(gone)
        assert set(sorted(present)[-last:]) <= stay and set(present) & set(protect) <= stay
        assert all(s in stay for s in present if every and s % every == 0)
        assert to_delete(stay, last, every, protect) == []  # nothing more the second time


def test_best_pointer_faults(tmp_path):
    assert read_best(tmp_path) is None
    for text in ("", "[]", "{}", '{"step": "x", "value": 1}'):
        (tmp_path / "best.json").write_text(text)
        with pytest.raises(CheckpointError, match="repair or delete it"):
            read_best(tmp_path)


def test_stop_file_that_is_none(tmp_path):
    said = []
    for make in (
        lambda p: p.mkdir(),
        lambda p: p.write_bytes(b"\xff\xfe\x00"),
        lambda p: p.write_text("1.5"),
        lambda p: p.write_text("10 20"),
    ):
        path = tmp_path / str(len(said))
        make(path)
        assert not read_stop(path, 10, said.append).save and str(path) in said[-1]
    assert len(said) == 4


def test_sweep_touches_only_its_own_names(tmp_path):
    for name in (".git", ".hidden.txt", ".saving", "notes.saving", "100"):
        (tmp_path / name).mkdir()
    (tmp_path / ".best.json.saving").write_text("half")
    sibling(tmp_path / "7", "saving").mkdir()
    assert len(sweep(tmp_path, keep=["7"])) == 1 and len(list(tmp_path.iterdir())) == 6
    assert sweep(tmp_path / "nowhere") == []


def test_publish_and_remove_do_not_trip_over_leftovers(tmp_path):
    for name in ("100", ".100.old", ".100.trash", ".100.saving"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    publish(tmp_path / "100", overwrite=True)
    assert (tmp_path / "100" / "x").read_text() == ".100.saving" and not (tmp_path / ".100.old").exists()
    remove_folder(tmp_path / "100")
    assert list(tmp_path.iterdir()) == [] and standing(tmp_path / "100") == tmp_path / "100"
    remove_tree(tmp_path / "100")
    assert durable.restore(tmp_path / "100") is False


def test_a_rename_that_fails_half_way_puts_the_old_one_back(tmp_path, monkeypatch):
    save(tmp_path / "100", 1)
    real = os.rename

    def rename(source, target):
        if Path(source).name == ".100.saving":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path / "100", 2, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["100"] and content(tmp_path / "100") == 1


def test_sweep_puts_back_what_a_replacement_left(tmp_path):
    save(tmp_path / "100", 1)
    os.rename(tmp_path / "100", sibling(tmp_path / "100", "old"))
    assert "put back" in sweep(tmp_path)[0] and (tmp_path / "100").is_dir()


def test_resume_from_a_folder_without_checkpoints(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is not a complete checkpoint"):
        resolve(tmp_path / "empty", tmp_path)
    save(tmp_path / "other" / "checkpoints" / "7", 7)
    assert (
        resolve(tmp_path / "other", tmp_path)
        == resolve(tmp_path / "other" / "checkpoints", tmp_path)
        == tmp_path / "other" / "checkpoints" / "7"
    )

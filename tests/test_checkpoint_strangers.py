"What a folder of checkpoints holds that is not the run's, files that belong elsewhere, indexes made by others, and checkpoints that are whole and of no use"

import fcntl
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from internlm_nb.checkpoint.durable import CheckpointError, in_bytes, sibling, sweep
from internlm_nb.checkpoint.find import is_sound, newest, newest_sound, resolve
from internlm_nb.checkpoint.index import check_state, seal
from internlm_nb.checkpoint.keep import (
    prune,
    read_best,
    read_stop,
    set_aside,
    space_needed,
    steps,
    superseded_bytes,
    superseded_remark,
)
from internlm_nb.checkpoint.logical import save_state
from internlm_nb.checkpoint.reader import Checkpoint, all_finite
from internlm_nb.checkpoint.shards import write_shard


def save(path: Path, bad: int | None = 0, **state) -> Path:
    "A checkpoint named by its step, after so many bad steps in a row"
    step = int(path.name)
    train = {} if bad is None else {"train": {"bad_in_a_row": bad}}
    return save_state(path, {"model.w": torch.full((3,), float(step))}, {"step": step, **train, **state})


def present(folder: Path) -> list[int]:
    return [found.step for found in steps(folder)]


# a good checkpoint is never lost


def test_a_streak_of_bad_steps_prunes_no_good_checkpoint(tmp_path):
    "Whatever is kept, whenever the streak begins, however long it lasts"
    rng = random.Random(0)
    for case in range(12):
        folder, last = tmp_path / str(case), rng.choice([1, 2, 3])
        begins, ends = rng.randrange(2, 6), rng.randrange(6, 12)
        for n in range(1, 13):
            save(folder / str(n), bad=n - begins + 1 if begins <= n < ends else 0)
            before = present(folder)
            prune(folder, last)
            good = [s for s in present(folder) if not begins <= s < ends]
            bad = [s for s in present(folder) if begins <= s < ends]
            if begins <= n < ends:
                assert good == [s for s in before if s < begins] and good[-1] == begins - 1
                assert (
                    len(bad) <= last
                    and newest_sound(folder) == folder / str(begins - 1)
                    and newest(folder) == folder / str(n)
                )
            elif n >= ends:
                assert len(good) == min(last, begins - 1 + n - ends + 1) and good[-1] == n and bad == []
        shutil.rmtree(folder)


def test_what_cannot_be_read_is_neither_counted_nor_deleted(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path / str(step))
    (tmp_path / "30" / "index.json").write_text("{")
    shard = next((tmp_path / "20").glob("*.safetensors"))
    shard.write_bytes(b"short")
    assert prune(tmp_path, last=1) == [] and present(tmp_path) == [10, 20, 30]
    assert newest_sound(tmp_path, say=lambda line: None) == tmp_path / "10"


def test_weights_that_are_known_not_to_be_finite_do_not_count(tmp_path):
    save(tmp_path / "10")
    save(tmp_path / "20", finite=False)
    save(tmp_path / "30", finite=True)
    assert prune(tmp_path, last=1) == [10, 20]
    save(tmp_path / "40", finite=False)
    assert prune(tmp_path, last=1) == [] and newest_sound(tmp_path) == tmp_path / "30"
    assert not is_sound({"finite": False}) and is_sound({}) and is_sound({"train": {"bad_in_a_row": 0}, "finite": True})


def test_best_and_multiples_stay_in_a_streak_and_after(tmp_path):
    for n in range(1, 7):
        save(tmp_path / str(n), bad=n if 2 <= n <= 4 else 0)
    assert prune(tmp_path, last=1, every=4, protect=[2]) == [1, 3, 5]


def test_snapshots_count_when_a_sound_one_is_looked_for(tmp_path):
    save(tmp_path / "10")
    save_state(tmp_path / "snapshot" / "0", {"model.w": torch.ones(1)}, {"step": 15, "train": {"bad_in_a_row": 0}})
    save_state(tmp_path / "snapshot" / "1", {"model.w": torch.ones(1)}, {"step": 20, "train": {"bad_in_a_row": 3}})
    assert newest(tmp_path) == tmp_path / "snapshot" / "1" and newest_sound(tmp_path) == tmp_path / "snapshot" / "0"
    assert newest_sound(tmp_path / "nowhere") is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_value_that_is_not_finite_is_found_and_named(dtype, value, tmp_path):
    x = torch.randn(1000).to(dtype)
    assert all_finite(x, step=64) and all_finite(x[:0]) and all_finite(torch.tensor(3.0).to(dtype))
    x[random.Random(str(dtype)).randrange(1000)] = value
    assert not all_finite(x, step=64)
    path = save_state(tmp_path / "1", {"model.a": torch.ones(3), "model.b": x, "adam.c": x, "step": torch.tensor(3)})
    assert (
        Checkpoint(path).not_finite() == "model.b"
        and Checkpoint(path).not_finite("adam.") == "adam.c"
        and Checkpoint(path).not_finite("step") is None
    )
    assert sorted(map(str, (Checkpoint(path).not_finite("model.", rank, 3) for rank in range(3)))) == [
        "None",
        "None",
        "model.b",
    ]


# what is not the run's stays where it is


def test_nobody_elses_things_are_touched(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        save(folder / str(step))
    outside = save(tmp_path / "elsewhere" / "5")
    (folder / "5").symlink_to(outside)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "15").mkdir()
    (folder / "15" / "index.json").write_text('{"title": "a book"}')
    (folder / "007").mkdir()
    (folder / "20" / "plot.png").write_text("mine")
    for name in (".notes.old", ".my.work.saving", ".30.d.trash"):
        (folder / name).mkdir()
        (folder / name / "index.json").write_text("mine")
    for kind in ("saving", "trash"):
        sibling(folder / "40", kind).mkdir()
        (sibling(folder / "40", kind) / "mine.txt").write_text("mine")
    sibling(folder / "50", "saving").symlink_to(outside)
    (folder / "snapshot" / "0").mkdir(parents=True)
    (folder / "snapshot" / "0" / "mine.txt").write_text("mine")
    (folder / "snapshot" / ".1.saving").mkdir()
    (folder / "snapshot" / ".1.saving" / "rank-00000-00000.safetensors").write_text("half")

    def listing() -> set[str]:
        return {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}

    before = listing()
    said = sweep(folder)
    assert before - listing() == {
        "checkpoints/snapshot/.1.saving",
        "checkpoints/snapshot/.1.saving/rank-00000-00000.safetensors",
    }
    assert len(said) == 4 and sum("left alone: mine.txt in it" in line for line in said) == 2
    before = listing()
    assert prune(folder, last=1) == [10]
    assert before - listing() == {
        "checkpoints/10",
        *(f"checkpoints/10/{n}" for n in ("index.json", "rank-00000-00000.safetensors")),
    }
    with pytest.raises(CheckpointError, match=r"snapshot/0 holds mine\.txt, which is no part of a checkpoint"):
        save_state(folder / "snapshot" / "0", {"w": torch.ones(1)}, {"step": 31}, overwrite=True)
    assert Checkpoint(outside).read("model.w").tolist() == [5.0] * 3


@pytest.mark.parametrize("kind", ["link", "folder", "file", "book"])
def test_what_would_be_in_the_way_of_a_save_is_said_before_and_stays(kind, tmp_path):
    save(tmp_path / "10")
    save(tmp_path / "20")
    if kind == "link":
        (tmp_path / "30").symlink_to(tmp_path / "10")
    elif kind == "file":
        (tmp_path / "30").write_text("mine")
    else:
        (tmp_path / "30").mkdir()
        (tmp_path / "30" / ("index.json" if kind == "book" else "a.txt")).write_text('{"title": "a book"}')
        if kind == "book":
            (tmp_path / "30" / "chapter.txt").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(
        CheckpointError, match="30: is no checkpoint that this run wrote, and stands where it will save: move it away"
    ):
        set_aside(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    set_aside(tmp_path, 30)  # not in the way of what is still to come


def test_what_is_put_aside_is_said(tmp_path):
    for step in (10, 20):
        save(tmp_path / str(step))
    (tmp_path / "30").mkdir()  # half copied
    assert superseded_bytes(tmp_path) == 0 and superseded_remark(tmp_path) == ""
    assert [found.step for found in set_aside(tmp_path, 10)] == [20, 30] and present(tmp_path) == [10]
    size = sum(p.stat().st_size for p in (tmp_path / "superseded" / "20").iterdir())
    assert superseded_bytes(tmp_path) == size and in_bytes(size) in superseded_remark(tmp_path)


def test_room_for_all_that_are_there_at_once(tmp_path):
    assert [space_needed(1000, n) for n in (1, 3)] == [2000, 4000]
    assert (
        space_needed(1000, 3, best=True, snapshots=True) == 7000 and space_needed(1000, 0, saves=9, best=True) == 10_000
    )
    save(tmp_path / "10")
    save(tmp_path / "20")
    one = sum(p.stat().st_size for p in (tmp_path / "10").iterdir())
    assert space_needed(one, 2, folder=tmp_path) == pytest.approx(one, abs=4) and space_needed(
        one, 5, folder=tmp_path
    ) == pytest.approx(4 * one, abs=4)
    save_state(
        tmp_path / "snapshot" / "0", {"model.w": torch.full((3,), 1.0)}, {"step": 11, "train": {"bad_in_a_row": 0}}
    )
    assert space_needed(one, 5, snapshots=True, folder=tmp_path) == pytest.approx(5 * one, abs=6)


# files that belong elsewhere


def test_a_shard_of_another_checkpoint_is_noticed_whatever_its_size(tmp_path):
    "Same run, same shapes, same sizes: only the id tells them apart"
    one, two = save(tmp_path / "10"), save(tmp_path / "20")
    shutil.copy(next(two.glob("*.safetensors")), next(one.glob("*.safetensors")))
    for check in (True, False):
        with pytest.raises(CheckpointError, match=r"10/rank-00000-00000\.safetensors: belongs to another checkpoint"):
            Checkpoint(one, check=check).read("model.w")
    said: list[str] = []
    (tmp_path / "20" / "index.json").write_text("{")
    save(tmp_path / "5")
    assert (
        newest(tmp_path, verify=True, say=said.append) == tmp_path / "5" and "belongs to another checkpoint" in said[1]
    )


def test_older_files_have_no_id_and_load(tmp_path):
    path = save(tmp_path / "10")
    body = json.loads((path / "index.json").read_text())
    body.pop("crc32")
    body.pop("id")
    file = path / "rank-00000-00000.safetensors"
    facts = write_shard(file, {"model.w": torch.full((3,), 10.0)})
    body["files"] = {file.name: {"bytes": facts["bytes"], "header_crc32": facts["header"]}}
    (path / "index.json").write_text(seal(body))
    assert Checkpoint(path).read("model.w").tolist() == [10.0] * 3
    Checkpoint(path).verify()


def resealed(path: Path, change) -> None:
    "Change an index and seal it again, as somebody might who knows the format"
    body = json.loads((path / "index.json").read_text())
    body.pop("crc32")
    change(body)
    (path / "index.json").write_text(seal(body))


def _file(name):
    def change(body):
        (old,) = body["files"]
        body["files"] = {name: body["files"][old]}
        body["tensors"]["model.w"]["chunks"][0]["file"] = name

    return change


def _chunk(**fields):
    return lambda body: body["tensors"]["model.w"]["chunks"][0].update(fields)


def _tensor(**fields):
    return lambda body: body["tensors"]["model.w"].update(fields)


@pytest.mark.parametrize(
    "change, words",
    [
        (_file("../10/rank-00000-00000.safetensors"), r"names the file '\.\./10/rank"),
        (_file("/etc/passwd"), "names the file '/etc/passwd'"),
        (_file(".."), r"names the file '\.\.'"),
        (_file(""), "names the file ''"),
        (_file("a\0b"), "names the file"),
        (_file("sub/rank.safetensors"), "bare names"),
        (_file("missing.safetensors"), r"missing\.safetensors: missing"),
        (_chunk(file="other"), "none of its files"),
        (_chunk(offsets=[1]), "lies outside"),
        (_chunk(offsets=[-1]), "offsets is"),
        (_chunk(sizes=[10**40]), "lies outside"),
        (_chunk(sizes=[1.5]), "sizes is"),
        (_chunk(range=[5, 2]), "flat range"),
        (_chunk(range=[1]), "no index that this library wrote"),
        (_chunk(crc32=None), "crc32 is None"),
        (_chunk(key=7), "key is 7"),
        (_tensor(shape=[10**30]), "more than all of its files"),
        (_tensor(shape=[True]), "shape is"),
        (_tensor(dtype="complex64"), "unknown type 'complex64'"),
        (_tensor(dtype=None), "unknown type None"),
        (_tensor(chunks=None), "chunks is None"),
        (lambda body: body["tensors"].update(x=[]), "no index that this library wrote"),
        (lambda body: body.update(tensors=[]), "tensors is"),
        (lambda body: body.update(files=None), "files is None"),
        (lambda body: body.pop("state"), "state is None"),
        (lambda body: next(iter(body["files"].values())).update(bytes=10**30), "instead of 1"),
        (lambda body: next(iter(body["files"].values())).update(bytes="12"), "bytes is '12'"),
        (lambda body: next(iter(body["files"].values())).pop("header_crc32"), "'header_crc32' is missing"),
    ],
)
def test_an_index_that_was_sealed_again_is_an_error_and_the_one_before_is_taken(change, words, tmp_path):
    save(tmp_path / "10")
    path = save(tmp_path / "20")
    resealed(path, change)
    said: list[str] = []
    assert newest(tmp_path, say=said.append) == tmp_path / "10" and str(path) in said[0]
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(path)


def test_json_of_any_depth_is_damage(tmp_path):
    path = save(tmp_path / "10")
    (path / "index.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        Checkpoint(path)


def test_links_that_lead_outside_are_not_followed(tmp_path):
    path = save(tmp_path / "10")
    file = path / "rank-00000-00000.safetensors"
    shutil.move(file, tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(
        CheckpointError, match=r"rank-00000-00000\.safetensors: is a link to .*elsewhere\.safetensors, outside"
    ):
        Checkpoint(path)
    (tmp_path / "linked").symlink_to(save(tmp_path / "20"))  # of a whole checkpoint: that is where the user wants it
    assert Checkpoint(tmp_path / "linked").read("model.w").tolist() == [20.0] * 3


@pytest.mark.parametrize("name", ["index.json", "rank-00000-00000.safetensors"])
def test_only_regular_files_are_opened(name, tmp_path):
    path = save(tmp_path / "10")
    (path / name).unlink()
    os.mkfifo(path / name)  # opened like a file it would wait for a writer, for ever
    with pytest.raises(CheckpointError, match=f"{name}: is no regular file"):
        Checkpoint(path)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: is no regular file"):
        Checkpoint(path)


def test_pointers_that_are_pipes_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "best.json")
    os.mkfifo(tmp_path / "stop")
    with pytest.raises(CheckpointError, match=r"best\.json: is no regular file"):
        read_best(tmp_path)
    said: list[str] = []
    assert not read_stop(tmp_path / "stop", 1, said.append).quit and "no regular file" in said[0]


def test_permission_is_said_as_permission(tmp_path):
    "As another user, in a child process, where this one is root"
    for name in ("index.json", "rank-00000-00000.safetensors"):
        path = save(tmp_path / ("10" if name == "index.json" else "20"))
        (path / name).chmod(0)
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                if os.geteuid() == 0:
                    for folder in [tmp_path, *tmp_path.parents][:-2]:
                        folder.chmod(0o755)
                    os.setuid(65534)
                Checkpoint(path)
            except BaseException as error:
                os.write(write, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        said = os.read(read, 4000).decode()
        assert (
            said.startswith("CheckpointError") and f"{name}: permission denied" in said and "nothing is damaged" in said
        )


# a reader beside a run


def test_a_reader_says_what_the_run_deleted_and_not_what_it_is_writing(tmp_path):
    folder = tmp_path / "checkpoints"
    path = save(folder / "10")
    save(folder / "20")
    checkpoint = Checkpoint(path)
    assert prune(folder, last=1) == [10]
    with pytest.raises(CheckpointError, match="deleted meanwhile by the run"):
        checkpoint.read("model.w")
    with pytest.raises(CheckpointError, match="deleted meanwhile by the run"):
        Checkpoint(path)
    sibling(folder / "30", "saving").mkdir()
    said: list[str] = []
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert newest(folder, say=said.append) == folder / "20" and said == []
    assert newest(folder, say=said.append) == folder / "20" and "a save that was not finished" in said[0]


def test_a_checkpoint_that_goes_while_one_looks_is_no_damage(tmp_path, monkeypatch):
    import internlm_nb.checkpoint.find as find

    for step in (10, 20):
        save(tmp_path / str(step))
    real, said = find.Checkpoint, []

    def slow(path, *args):
        if path.name == "20":
            shutil.rmtree(path)
        return real(path, *args)

    monkeypatch.setattr(find, "Checkpoint", slow)
    assert newest(tmp_path, say=said.append) == tmp_path / "10" and said == [
        f"{tmp_path / '20'} skipped: deleted meanwhile by the run"
    ]


def test_checkpoints_known_to_be_damaged_are_passed_over(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (10, 20):
        save(folder / str(step))
    said: list[str] = []
    bad = {folder / "20": "rank 3 saw it"}
    assert newest(folder, say=said.append, damaged=bad) == folder / "10" and "rank 3 saw it" in said[0]
    assert resolve("auto", tmp_path, say=said.append, damaged=bad) == folder / "10"
    with pytest.raises(CheckpointError, match="rank 3 saw it"):
        resolve(folder / "20", tmp_path, damaged=bad)


# values that JSON cannot hold


def test_values_that_cannot_be_saved_are_named_before_a_byte_is_written(tmp_path):
    for state, words in [
        ({"run": {"train": {"max_minutes": float("inf")}}}, r"run\.train\.max_minutes is inf"),
        ({"train": {"best_loss": float("nan")}}, r"train\.best_loss is nan"),
        ({"data": [{"weight": float("-inf")}]}, r"data\[0\]\.weight is -inf"),
        ({"when": torch.ones(1)}, "when is of type Tensor"),
        ({"set": {1, 2}}, "set is of type set"),
    ]:
        with pytest.raises(CheckpointError, match=f"cannot be saved as JSON: {words}"):
            save_state(tmp_path / "10", {"w": torch.ones(1)}, state)
        with pytest.raises(CheckpointError, match=words):
            check_state(state)
        assert list(tmp_path.iterdir()) == []
    save_state(tmp_path / "10", {"w": torch.ones(1)}, {"big": 2**200, "small": 5e-324, "none": None, "pair": (1, 2)})
    assert Checkpoint(tmp_path / "10").state == {"big": 2**200, "small": 5e-324, "none": None, "pair": [1, 2]}

"Ten steps are five, a death, and five more, whatever is switched on; nothing that was saved is lost"

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_runs import TINY, facts, same, tensors, tiny_run, train_state, trainer, with_fields, write_folder

from internlm_nb.checkpoint.durable import CheckpointError
from internlm_nb.checkpoint.keep import read_best, steps
from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.data.tokenfiles import write_tokens
from internlm_nb.data.tokenline import TokenFileError
from internlm_nb.observe.sinks import Sink
from internlm_nb.run.callbacks import Callback
from internlm_nb.run.stopping import TOGETHER_S
from internlm_nb.run.trainer import Stopped
from internlm_nb.train.precision import LossScaleConfig
from internlm_nb.train.schedules import ScheduleConfig

pytestmark = pytest.mark.usefixtures("no_plots")


# resume == straight, in this process


def everything(root: Path, precision: str, write=True):
    "A run with all that has a state or a schedule: two folders mixed, ramp-up, skipped batches, beta2 schedule, frozen and own-rate groups, validation"
    a, b, v = (write_folder(root / n, seed=i) if write else root / n for i, n in enumerate("abv"))
    return tiny_run(
        data_train_folder=(f"{a}=0.7", f"{b}=0.3"), data_valid_folder=str(v), data_rampup="1 1 1", data_skip_batches="2-3,6", data_micro_num=3, data_prefetch=2,
        optim_beta2_c=0.8, optim_frozen=("blocks.0.*norm*",), optim_own_lr=("embedding.*=1e-3",), optim_no_decay=("*norm*",),
        schedule=ScheduleConfig(kind="wsd", warmup_ratio=0.2, decay_ratio=0.3, decay_shape="sqrt"), train_valid_every=3, train_precision=precision,
        train_loss_scale=LossScaleConfig(init=2.0**22, growth_interval=3), checkpoint_every=1,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_resume_with_everything_on(precision, tmp_path):
    run = everything(tmp_path, precision)
    trainer(run, tmp_path / "straight").fit()
    for stop in (1, 5, 9):
        trainer(run, tmp_path / "halves").fit(stop)
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.move(tmp_path / "halves", tmp_path / "cut")  # also: a run's folder may be moved
        again = trainer(run, tmp_path / "cut")
        assert again.state.step == stop
        again.fit()
        same(tmp_path / "straight", tmp_path / "cut", 10)
    assert {r["micro_num"] for r in facts(tmp_path / "cut")} == {1, 2, 3}


@settings(deadline=None, derandomize=True, max_examples=14)
@given(
    st.fixed_dictionaries(dict(
        train_precision=st.sampled_from(["float32", "bfloat16", "float16", "float64", "tf32"]), data_micro_num=st.integers(1, 3), data_micro_bsz=st.integers(1, 3),
        data_pack_sample_into_one=st.booleans(), train_recompute=st.sampled_from([0.0, 0.5, 1.0]), train_recompute_policy=st.sampled_from(["full", "selective"]),
        optim_clip=st.sampled_from([0.0, 0.1, 1.0]), schedule=st.builds(ScheduleConfig, kind=st.sampled_from(["cosine", "constant", "linear", "wsd"]), init_steps=st.integers(0, 1), warmup_ratio=st.just(0.2)),
        data_rampup=st.sampled_from(["", "1 1 1"]), data_skip_batches=st.sampled_from(["", "1", "0-2,4"]), train_label_smoothing=st.sampled_from([0.0, 0.1]),
        optim_beta2_c=st.sampled_from([0.0, 0.8]), train_valid_every=st.integers(0, 2), data_prefetch=st.integers(0, 2), checkpoint_keep_last=st.integers(1, 2),
    )), st.integers(1, 4),
)  # fmt: skip
def test_resume_equals_straight(tmp_path_factory, fields, cut):
    "Any small run, cut anywhere"
    root = tmp_path_factory.mktemp("r")
    run = tiny_run(replace(TINY, num_layers=2), train_steps=5, checkpoint_every=1, **fields)
    trainer(run, root / "a").fit()
    trainer(run, root / "b").fit(cut)
    trainer(run, root / "b").fit()
    same(root / "a", root / "b", 5)


# killed


KILLED = """
import os, random, sys, threading
import torch; torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_train_resume
import internlm_nb.run.callbacks as callbacks
import internlm_nb.run.saver as saver
callbacks.save_plots = lambda d: [d / "plots" / "none"]
root = Path(sys.argv[2])
test_train_resume.trainer(test_train_resume.everything(root, "float32", write=False), root / "warm")  # what is imported late is imported here, once
kill_soon = lambda rng, most: threading.Timer(rng.uniform(0, most), lambda: os.kill(os.getpid(), 9)).start()


def life(precision, where, rng):                                     # until death, or the end of the run
    t = test_train_resume.trainer(test_train_resume.everything(root, precision, write=False), root / precision)
    victim, save = t.state.step + rng.randrange(3), saver.save_run

    class Dying(callbacks.Callback):
        def before_step(self, state):
            if where == "anywhere" and state.step == victim:
                kill_soon(rng, 0.08)

    def dying_save(*a, **k):
        if where == "saving" and t.state.step > victim:
            kill_soon(rng, 0.03)
        return save(*a, **k)

    t.callbacks.append(Dying())
    saver.save_run = dying_save
    t.fit()


for precision, where in (("float32", "anywhere"), ("bfloat16", "saving"), ("float16", "anywhere")):
    for seed in range(11):                                            # one import, many deaths
        child = os.fork()
        if child == 0:
            if seed == 10:
                where = "nowhere"
            life(precision, where, random.Random(seed))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(precision, "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)
        if not os.WIFSIGNALED(status):
            break
"""


def test_killed_again_and_again(tmp_path):
    "kill -9 at random moments, in steps and in saves, until the run is through: bit for bit the run that was left alone"
    for precision in ("float32", "bfloat16", "float16"):
        trainer(everything(tmp_path, precision, write=precision == "float32"), tmp_path / f"straight-{precision}").fit()
    here = str(Path(__file__).parent)
    said = subprocess.run(
        [sys.executable, "-c", KILLED, here, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert said.returncode == 0 and "exit 1" not in said.stdout, said.stderr[-3000:]
    for precision in ("float32", "bfloat16", "float16"):
        assert said.stdout.count(f"{precision} killed") >= 2 and f"{precision} exit 0" in said.stdout, said.stdout
        a, b = tmp_path / f"straight-{precision}", tmp_path / precision
        same(a, b, 10)
        assert read_best(a / "checkpoints") == read_best(b / "checkpoints")


def test_died_between_saving_the_best_and_saying_so(tmp_path, monkeypatch):
    "The mark is set by the next start"
    run = tiny_run(train_steps=4, train_valid_every=2, checkpoint_every=0)
    trainer(run, tmp_path / "a").fit()
    monkeypatch.setattr("internlm_nb.run.saver.mark_best", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer(run, tmp_path / "b").fit()
    monkeypatch.undo()
    monkeypatch.setattr("internlm_nb.run.callbacks.save_plots", lambda run_dir: [run_dir / "plots" / "none"])
    trainer(run, tmp_path / "b")
    assert read_best(tmp_path / "b" / "checkpoints")["step"] == 2
    trainer(run, tmp_path / "b").fit()
    assert read_best(tmp_path / "b" / "checkpoints") == read_best(tmp_path / "a" / "checkpoints")
    same(tmp_path / "a", tmp_path / "b", 4)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    "One flipped bit in the newest: the one before is taken, with a word, and the run comes out the same"
    run = tiny_run(checkpoint_every=2, checkpoint_keep_last=0)
    trainer(run, tmp_path / "a").fit()
    trainer(run, tmp_path / "b").fit(6)
    shard = next((tmp_path / "b" / "checkpoints" / "6").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 4
    shard.write_bytes(raw)
    said: list[str] = []
    again = trainer(run, tmp_path / "b", said)
    assert again.state.step == 4 and any("6 skipped" in line for line in said)
    again.fit()
    same(tmp_path / "a", tmp_path / "b", 10)
    assert (tmp_path / "b" / "checkpoints" / "superseded" / "6").exists() or (
        tmp_path / "b" / "checkpoints" / "6"
    ).exists()


def test_disk_full_at_a_save_costs_no_checkpoint(tmp_path, monkeypatch):
    run = tiny_run(checkpoint_every=2)
    trainer(run, tmp_path / "a").fit()
    t = trainer(run, tmp_path / "b")
    t.fit(3)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        t.fit()
    monkeypatch.setattr(os, "fsync", real)
    assert [f.step for f in steps(tmp_path / "b" / "checkpoints")] == [2]
    assert {p.name for p in (tmp_path / "b" / "checkpoints").iterdir()} == {"2", ".lock"}
    t.fit()  # the same object goes on: state and weights are those of step 4
    same(tmp_path / "a", tmp_path / "b", 10)


# stopping


class At(Sink):
    "Calls something when the record of a step is written"

    def __init__(self, step, call):
        self.step, self.call = step, call

    def write(self, record):
        if record["step"] == self.step and "loss" in record:
            self.call()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves(number, tmp_path):
    run = tiny_run(checkpoint_every=0)
    trainer(run, tmp_path / "a").fit()
    t = trainer(run, tmp_path / "b", sinks=[At(3, lambda: os.kill(os.getpid(), number))])
    before = signal.getsignal(number)
    assert t.fit() is Stopped.INTERRUPTED and t.state.step == 4 and signal.getsignal(number) is before
    assert [f.step for f in steps(tmp_path / "b" / "checkpoints")] == [4]
    trainer(run, tmp_path / "b").fit()
    same(tmp_path / "a", tmp_path / "b", 10)


def test_interrupted_at_the_last_step_is_done(tmp_path):
    t = trainer(tiny_run(train_steps=2), tmp_path / "a", sinks=[At(1, lambda: t.stop())])
    assert t.fit() is Stopped.DONE and t.done


def test_a_signal_during_the_first_validation(tmp_path, monkeypatch):
    "Ctrl-C while step 0 is validated is heard: one step, saved, and a clean end"
    import internlm_nb.run.callbacks as module

    real = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *a: (os.kill(os.getpid(), signal.SIGINT), real(*a))[1])
    t = trainer(tiny_run(train_valid_every=10), tmp_path / "a")
    assert t.fit() is Stopped.INTERRUPTED and t.state.step == 1 and (tmp_path / "a" / "checkpoints" / "1").exists()


def test_second_interrupt_stops_at_once(tmp_path):
    "In the middle of a step: the checkpoint stands, the torn object refuses to go on, a new one comes out the same"
    run = tiny_run(checkpoint_every=2)
    trainer(run, tmp_path / "a").fit()
    t = trainer(run, tmp_path / "b")
    t.fit(3)

    def twice(g):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # at once again: the same request, so the step goes on
        time.sleep(TOGETHER_S + 0.1)
        os.kill(os.getpid(), signal.SIGINT)  # somebody means it
        return g

    handle = t.model.head.weight.register_hook(twice)
    with pytest.raises(KeyboardInterrupt):
        t.fit()
    handle.remove()
    with pytest.raises(RuntimeError, match="make a new Trainer"):
        t.fit()
    assert [f.step for f in steps(tmp_path / "b" / "checkpoints")] == [2]
    again = trainer(run, tmp_path / "b")
    assert again.state.step == 2
    again.fit()
    same(tmp_path / "a", tmp_path / "b", 10)


def test_from_another_thread(tmp_path):
    "Outside the main thread there are no signals, but stop() works"
    t = trainer(tiny_run(train_steps=10_000), tmp_path / "a")
    thread = threading.Thread(target=t.fit)
    thread.start()
    while not (tmp_path / "a" / "metrics.jsonl").exists():
        time.sleep(0.01)
    t.stop()
    thread.join(30)
    assert not thread.is_alive() and (tmp_path / "a" / "checkpoints" / str(t.state.step)).exists()


def test_time_limit_saves_in_time(tmp_path):
    "It stops before the limit, saves, and the next start, with time of its own, goes on"
    run = tiny_run(train_steps=100_000, train_max_minutes=0.02, checkpoint_every=0, train_valid_every=50)
    begin = time.monotonic()
    t = trainer(run, tmp_path / "a")
    assert t.fit() is Stopped.TIME and t.state.step > 1
    assert time.monotonic() - begin < 1.2 + 1.0  # a busy machine may be slow once more
    assert [f.step for f in steps(tmp_path / "a" / "checkpoints")][-1] == t.state.step
    assert trainer(run, tmp_path / "a").state.step == t.state.step
    made = t.state.step
    assert t.fit() is Stopped.TIME and t.state.step > made + 1  # a further call has time of its own


def test_stop_file(tmp_path):
    "n: save and quit at n; -n: only save; 0 and nonsense: nothing, the latter with a word. A file elsewhere may be named"
    run = tiny_run(checkpoint_every=0, checkpoint_keep_last=0)
    trainer(run, tmp_path / "a").fit()
    t = trainer(run, tmp_path / "b")
    for text, want in (("-2", 2), ("0", None), ("3", 3)):
        (tmp_path / "b" / "stop").write_text(text)
        assert t.fit(1 if want != 2 else 2) is (Stopped.STOP_FILE if text == "3" else Stopped.PAUSED)
        if want:
            assert (tmp_path / "b" / "checkpoints" / str(want)).exists()
        if text == "0":
            assert t.state.step == 3
            t = trainer(run, tmp_path / "b")  # back to 2, which -2 has saved
            assert t.state.step == 2
    trainer(run, tmp_path / "b").fit()  # a stop file whose step is over does nothing
    same(tmp_path / "a", tmp_path / "b", 10)
    said: list[str] = []
    (tmp_path / "elsewhere").write_text("soon")
    trainer(
        with_fields(run, checkpoint_stop_file=str(tmp_path / "elsewhere"), train_steps=1), tmp_path / "c", said
    ).fit()
    assert any("write one integer" in line for line in said)


def test_two_processes_in_one_folder(tmp_path):
    "The second is refused before it sweeps away what the first one writes; when the first is dead, it may"
    run = tiny_run(train_steps=100_000)
    child = os.fork()
    if child == 0:
        trainer(run, tmp_path / "a").fit()
        os._exit(0)
    try:
        while not (tmp_path / "a" / "metrics.jsonl").exists():
            time.sleep(0.01)
        (tmp_path / "a" / "checkpoints" / ".77.saving").mkdir()
        with pytest.raises(CheckpointError, match="another process trains in this folder"):
            trainer(run, tmp_path / "a")
        assert (tmp_path / "a" / "checkpoints" / ".77.saving").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert trainer(run, tmp_path / "a").fit(1) is Stopped.PAUSED


# what is kept


def test_retention_best_and_snapshots(tmp_path):
    run = tiny_run(
        train_steps=12,
        checkpoint_every=1,
        checkpoint_keep_last=2,
        checkpoint_keep_every=5,
        train_valid_every=4,
        optim_lr=1e-4,
    )
    trainer(run, tmp_path / "a").fit()
    best = read_best(tmp_path / "a" / "checkpoints")["step"]
    validated = {r["step"]: r["valid_loss"] for r in facts(tmp_path / "a", "validation.jsonl")}
    assert best == min((s for s in validated if s), key=validated.get)
    assert {f.step for f in steps(tmp_path / "a" / "checkpoints")} == {5, 10, 11, 12, best}

    snap = tiny_run(train_steps=9, checkpoint_every=4, checkpoint_snapshot_every=1)
    trainer(snap, tmp_path / "s").fit(7)
    at = {Checkpoint(tmp_path / "s" / "checkpoints" / "snapshot" / slot).state["step"] for slot in "01"}
    assert at == {6, 7}
    again = trainer(snap, tmp_path / "s")
    assert again.state.step == 7  # the newest is a snapshot
    again.fit()
    trainer(snap, tmp_path / "t").fit()
    same(tmp_path / "s", tmp_path / "t", 9)


def test_best_survives_retention(tmp_path):
    "A rate that ruins the model: the first validation stays the best, and its checkpoint is kept for good"
    run = tiny_run(
        train_steps=8,
        checkpoint_every=1,
        checkpoint_keep_last=1,
        train_valid_every=1,
        optim_lr=3.0,
        optim_clip=0.0,
        schedule=ScheduleConfig(kind="constant", warmup_ratio=0.4),
    )
    t = trainer(run, tmp_path / "a")
    t.state = replace(t.state, best_loss=None)
    t.fit(1)
    t.state = replace(t.state, best_loss=-1.0, best_step=1)
    from internlm_nb.checkpoint.keep import mark_best

    mark_best(tmp_path / "a" / "checkpoints", 1, -1.0)
    t.fit()
    assert {f.step for f in steps(tmp_path / "a" / "checkpoints")} == {1, 8}


# where a run starts


def test_resume_and_init(tmp_path):
    "auto, none, PATH, and init: an explicit path wins, nothing is overwritten, weights may go into a longer context"
    run = tiny_run(train_steps=6, checkpoint_every=2, checkpoint_keep_last=0)
    trainer(run, tmp_path / "a").fit()
    folder = tmp_path / "a" / "checkpoints"
    straight = facts(tmp_path / "a")

    back = trainer(with_fields(run, checkpoint_resume=str(folder / "2")), tmp_path / "a")  # auto would have taken 6
    assert back.state.step == 2 and {p.name for p in (folder / "superseded").iterdir()} == {"4", "6"}
    back.fit()
    assert facts(tmp_path / "a") == straight and len(facts(tmp_path / "a", "metrics.dropped.jsonl")) == 4

    other = trainer(
        with_fields(run, checkpoint_resume=str(folder / "4")), tmp_path / "b"
    )  # another run's checkpoint, into a folder of its own
    other.fit()
    assert [r["step"] for r in facts(tmp_path / "b")] == [4, 5] and facts(tmp_path / "b") == straight[4:]
    assert all(
        torch.equal(x, y) for x, y in zip(tensors(tmp_path / "a", 6).values(), tensors(tmp_path / "b", 6).values())
    )

    longer = with_fields(
        run,
        model_rope_base=5e5,
        model_max_position_embeddings=4096,
        data_seq_len=64,
        checkpoint_init=str(folder / "6"),
        checkpoint_resume="none",
        train_precision="bfloat16",
    )
    (tmp_path / "a" / "my notes.txt").write_text("keep me")
    said: list[str] = []
    fresh = trainer(longer, tmp_path / "a", said)  # its own folder's checkpoint, which is put aside
    assert (
        fresh.state.step == 0
        and fresh.state.num_consumed_tokens == 0
        and not fresh.optimizer.named_parts()["exp_avg.head.weight"].tensor.any()
    )
    assert torch.equal(
        fresh.optimizer.named_parts()["master.head.weight"].tensor,
        tensors(tmp_path / "a.1", 6)["model.head.weight"].flatten(),
    )
    assert (
        (tmp_path / "a" / "my notes.txt").exists()
        and facts(tmp_path / "a.1") == straight
        and any("a.1" in line for line in said)
    )
    fresh.fit()

    again = trainer(
        replace(longer, checkpoint=replace(longer.checkpoint, resume="auto")), tmp_path / "a", said
    )  # init is not taken twice
    assert again.state.step == 6 and any("--checkpoint.init is not used" in line for line in said)


@pytest.mark.parametrize("change,named", [
    (dict(model_num_layers=1), "--model.num-layers: 2 -> 1"), (dict(data_seq_len=64), "--data.seq-len: 32 -> 64"), (dict(train_seed=2), "--train.seed: 1024 -> 2"),
    (dict(data_micro_num=4), "--data.micro-num: 2 -> 4"), (dict(optim_frozen=("head.*",)), "--optim.frozen"), (dict(model_rope_base=5e5), "--model.rope-base"),
    (dict(data_skip_batches="1"), "--data.skip-batches: '' -> '1'"),
])  # fmt: skip
def test_another_run_is_refused(change, named, tmp_path):
    run = tiny_run(train_steps=6, checkpoint_every=3)
    trainer(run, tmp_path / "a").fit(3)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="cannot resume") as error:
        trainer(with_fields(run, **change), tmp_path / "a")
    assert named in str(error.value) and "--checkpoint.init" in str(error.value)
    assert before == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))  # a refusal touches nothing


def test_a_harmless_change_is_said(tmp_path):
    "Longer, another rate, other saving, batches to come left out, another precision: said, and the run goes on"
    run = tiny_run(train_steps=6, checkpoint_every=3)
    trainer(run, tmp_path / "a").fit(3)
    for precision in ("bfloat16", "float16", "float64"):
        said: list[str] = []
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        t = trainer(
            with_fields(run, train_steps=8, optim_lr=1e-3, data_skip_batches="4-5", train_precision=precision),
            tmp_path / "b",
            said,
        )
        assert {"--train.steps: 6 -> 8", "--optim.lr: 0.003 -> 0.001", "--data.skip-batches: '' -> '4-5'"} <= {
            line.removeprefix("changed since the checkpoint: ") for line in said
        }
        t.fit()
        assert [r["step"] for r in facts(tmp_path / "b")] == list(range(8)) and facts(tmp_path / "b")[-1]["loss"] < 5


def test_fewer_steps_than_made(tmp_path):
    run = tiny_run(train_steps=6, checkpoint_every=3)
    trainer(run, tmp_path / "a").fit()
    with pytest.raises(ValueError, match=r"--train.steps is 2, but .* has made 6 steps"):
        trainer(with_fields(run, train_steps=2), tmp_path / "a")
    said: list[str] = []
    assert trainer(run, tmp_path / "a", said).fit() is Stopped.DONE and any("is complete" in line for line in said)
    assert [r["step"] for r in facts(tmp_path / "a")] == list(range(6))


def test_folders_moved_and_folders_grown(tmp_path):
    "The data may lie elsewhere at the resume; it may not be other data"
    folder = write_folder(tmp_path / "tokens")
    run = tiny_run(data_train_folder=(str(folder),), train_steps=6, checkpoint_every=3)
    trainer(run, tmp_path / "a").fit()
    trainer(run, tmp_path / "b").fit(3)
    moved = folder.rename(tmp_path / "elsewhere")
    there = with_fields(run, data_train_folder=(str(moved),))
    trainer(there, tmp_path / "b").fit()
    assert facts(tmp_path / "a") == facts(tmp_path / "b")
    trainer(there, tmp_path / "c").fit(3)
    write_tokens(moved / "en" / "more.bin", [[1, 2, 3]])
    with pytest.raises(ValueError, match="holds other data"):
        trainer(there, tmp_path / "c")


def test_data_that_changed_are_refused_or_said(tmp_path):
    "Other text in as many bytes; one byte of a large file, which only the file's time tells; other held-out text"
    folder, held = write_folder(tmp_path / "tokens"), write_folder(tmp_path / "held", count=20)
    big = write_tokens(folder / "en" / "big.bin", [[1, 2, 3]] * 20_000)
    run = tiny_run(data_train_folder=(str(folder),), data_valid_folder=str(held), train_valid_every=3)
    trainer(with_fields(run, checkpoint_every=3), tmp_path / "a").fit(3)
    path, raw = folder / "cn" / "a.bin", (folder / "cn" / "a.bin").read_bytes()
    path.write_bytes(raw.translate(bytes.maketrans(b"12", b"21")))
    with pytest.raises(ValueError, match=r"tokens holds other data: 20,120 documents.*as many as .*cn/a.bin has other"):
        trainer(run, tmp_path / "a")
    path.write_bytes(raw)
    large = bytearray(big.read_bytes())
    large[large.index(b"3]", 6000)] = ord("4")
    later = time.time_ns() + 10**9
    big.write_bytes(large)
    os.utime(big, ns=(later, later))
    (held / "cn" / "a.bin").rename(held / "cn" / "b.bin")
    (held / "cn" / "a.bin.meta").rename(held / "cn" / "b.bin.meta")
    said: list[str] = []
    t = trainer(run, tmp_path / "a", said)
    assert sum("tokens was written to since the checkpoint was made, last en/big.bin" in line for line in said) == 1
    assert sum("held holds other data" in line and "cn/b.bin has its content" in line for line in said) == 1
    assert t.state.step == 3 and t.state.best_loss is None


@pytest.mark.parametrize("how", ["broken", "shorter"])
def test_data_that_breaks_on_the_way_costs_no_step(how, tmp_path):
    "A document that cannot be read, deep in the run: the steps before it are saved, and the file and line are named"
    folder = write_folder(tmp_path / "tokens", kinds=("en",), count=700)
    run = tiny_run(data_train_folder=(str(folder),), train_steps=200, checkpoint_every=0)
    path = folder / "en" / "a.bin"

    class Cut(Callback):
        "Somebody writes the file anew while the run is under way"

        def before_step(self, state):
            if how == "shorter" and state.step == 2:
                os.truncate(path, at)

    t = trainer(run, tmp_path / "a", callbacks=[Cut()])
    raw = bytearray(path.read_bytes())
    at = raw.index(b"\n", 2 * len(raw) // 3) + 2  # inside some document's line
    raw[at : at + 1] = b"x"
    if how == "broken":
        path.write_bytes(raw)
    words = r"a.bin, line \d+" if how == "broken" else "a.bin: the file was changed while it was read"
    with pytest.raises(TokenFileError, match=words):
        t.fit()
    assert t.state.step > 0 and (tmp_path / "a" / "checkpoints" / str(t.state.step)).exists()


def test_hopeless_gradients_give_up(tmp_path):
    "And the newest checkpoint is one from before"
    run = tiny_run(train_max_bad_steps=3, checkpoint_every=2)
    t = trainer(run, tmp_path / "a")
    t.fit(2)
    t.model.head.weight.register_hook(lambda g: g * torch.nan)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        t.fit()
    a = tensors(tmp_path / "a", 2)
    assert all(torch.equal(a[f"model.{n}"], p) for n, p in t.model.named_parameters())
    assert json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])["grad_norm"] is None
    assert train_state(tmp_path / "a", 2)["bad_in_a_row"] == 0


def test_another_validation_set_starts_a_new_best(tmp_path):
    run = tiny_run(train_steps=4, train_valid_every=2)
    trainer(run, tmp_path / "a").fit(2)
    t = (
        trainer(with_fields(run, data_valid_packs=1), tmp_path / "a")
        if (tmp_path / "a" / "checkpoints" / "2").exists()
        else pytest.fail("no checkpoint")
    )
    assert t.state.best_loss is None
    t.fit()
    assert t.state.best_step == 4

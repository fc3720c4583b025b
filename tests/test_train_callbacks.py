"What stands around the steps: callbacks of a user's own, one exchange a step, figures that wait, and what must not be lost"

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from test_train_cli import OWN
from train_runs import facts, same, tensors, tiny_run, trainer, with_fields

from internlm_nb.apps.pretrain import main
from internlm_nb.checkpoint.durable import CheckpointError
from internlm_nb.checkpoint.keep import steps
from internlm_nb.observe.guarded import Guarded
from internlm_nb.observe.sinks import JsonlSink, Sink, keep_before, read_metrics, sample_metrics
from internlm_nb.observe.terminal import TerminalSink
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.run.callbacks import Callback
from internlm_nb.run.start import reheated
from internlm_nb.run.stopping import Stopped
from internlm_nb.train.config import ParallelConfig
from internlm_nb.train.schedules import ScheduleConfig

pytestmark = pytest.mark.usefixtures("no_plots")


class Notes(Callback):
    "Writes down the moments of a run"

    def __init__(self):
        self.seen = []

    def start(self, trainer):
        self.seen.append("start")

    def before_step(self, state):
        self.seen.append(f"before {state.step}")

    def after_step(self, record):
        self.seen.append(f"after {record.step}")

    def after_save(self, path):
        self.seen.append(f"saved {path.name}")

    def on_error(self, error):
        self.seen.append(type(error).__name__)

    def close(self):
        self.seen.append("close")


# a callback of one's own


def test_the_moments_of_a_run(tmp_path):
    notes = Notes()
    trainer(tiny_run(train_steps=2, checkpoint_every=0), tmp_path, callbacks=[notes]).fit()
    assert notes.seen == ["start", "before 0", "after 0", "before 1", "after 1", "saved 2", "close"]
    notes = Notes()  # the last step is one to save, and it is the best, and the run ends there: it is saved once
    trainer(
        tiny_run(train_steps=2, checkpoint_every=2, train_valid_every=1), tmp_path / "best", callbacks=[notes]
    ).fit()
    assert [what for what in notes.seen if what.startswith("saved")] == ["saved 1", "saved 2"]


def test_wishes_are_granted(tmp_path):
    "A save after step 2, and a stop after step 3; with one process what a record gives rise to happens after that step"

    class Wishes(Callback):
        def after_step(self, record):
            self.enough = record.step == 3

        def wants_save(self, step):
            return step == 2

        def wants_stop(self, step):
            return Stopped.WISH if getattr(self, "enough", False) else None

    t = trainer(tiny_run(checkpoint_every=0), tmp_path, callbacks=[Wishes()])
    assert t.fit() is Stopped.WISH and t.state.step == 4
    assert [f.step for f in steps(tmp_path / "checkpoints")] == [2, 4]


def test_a_callback_that_raises_costs_no_step(tmp_path):
    class Wrong(Notes):
        def after_step(self, record):
            if record.step == 2:
                raise KeyError("mine")

    wrong = Wrong()
    with pytest.raises(KeyError, match="mine"):
        trainer(tiny_run(checkpoint_every=0), tmp_path, callbacks=[wrong]).fit()
    assert [f.step for f in steps(tmp_path / "checkpoints")] == [3] and wrong.seen[-2:] == ["KeyError", "close"]


def test_a_trainer_is_let_go(tmp_path):
    "Callbacks hold it weakly, so its folder is free when nobody holds it any more"
    t = trainer(tiny_run(train_steps=1), tmp_path, callbacks=[Notes()])
    t.fit()
    ref = weakref.ref(t)
    del t
    assert ref() is None


HOOKS = """
from internlm_nb.observe.sinks import Sink
from internlm_nb.run.callbacks import Callback
from internlm_nb.run.stopping import Stopped


class Seen(Sink):
    def write(self, record):
        with open("seen.txt", "a") as file:
            file.write(f"{record['step']} ")


class Enough(Callback):
    def wants_stop(self, step):
        return Stopped.WISH if step == 3 else None


def callbacks(run):
    return [Enough()]


def sinks(run):
    return [Seen()]
"""


def test_a_run_file_brings_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN + HOOKS)
    main(["mine.py", "--run-dir", "out"], runs=tmp_path)
    assert Path("seen.txt").read_text() == "0 1 2 " and "a callback asked for it at step 3" in capsys.readouterr().out


# figures that wait


@pytest.mark.parametrize("every", [3, 4, 100])
def test_figures_that_wait_are_the_same(every, tmp_path):
    "Any number of steps read together: the same records, validations and weights, and all lines on disk at every save"
    run = tiny_run(train_valid_every=4, checkpoint_every=5)
    trainer(run, tmp_path / "a").fit()

    class Lines(Callback):
        def after_save(self, path):
            assert len(read_metrics(tmp_path / "b")) == int(path.name)

    trainer(with_fields(run, log_flush_every=every), tmp_path / "b", callbacks=[Lines()]).fit()
    same(tmp_path / "a", tmp_path / "b", 10)


@pytest.mark.parametrize("every", [1, 3])
def test_the_wait_for_data_counts(every, tmp_path):
    "In tokens a second, in TFLOP/s and in the shares of the peak; it stands beside them, and in the forecast"
    run = tiny_run(train_steps=3, log_flush_every=every)
    trainer(run, tmp_path / "fast").fit()
    t = trainer(run, tmp_path / "slow")
    real = t.loader.batch
    t.loader.batch = lambda *args: (time.sleep(0.1), real(*args))[1]  # type: ignore[method-assign]
    t.fit()
    now, lines = [0.0], []
    shown = TerminalSink(100, every=1, write=lines.append, clock=lambda: now[0])
    records = read_metrics(tmp_path / "slow")
    for r, s in zip(read_metrics(tmp_path / "fast"), records, strict=True):
        for name in ("tflops", "mfu", "mfu_causal", "hfu"):  # over the same seconds as tokens a second
            assert s[name] / s["tgs"] == pytest.approx(r[name] / r["tgs"], rel=1e-9)
        shown.write(s)
        now[0] += 10.0
    assert sum(s["tokens"] / s["tgs"] for s in records) >= sum(s["data_wait_s"] for s in records) >= 0.3
    assert "waiting for data" in lines[0] and "16m 10s to go" in lines[-1]  # 97 steps of 10 s


def test_figures_that_wait_are_written_when_a_step_fails(tmp_path):
    t = trainer(tiny_run(checkpoint_every=0, log_flush_every=100), tmp_path)
    calls = []
    t.model.head.weight.register_hook(
        lambda g: calls.append(1) or (_ for _ in ()).throw(MemoryError("full")) if len(calls) == 7 else calls.append(1)
    )
    with pytest.raises(MemoryError):
        t.fit()
    assert len(read_metrics(tmp_path)) == t.state.step > 0


# many ranks


def _exchanges(mesh, run, folder):
    "How many exchanges a step of the trainer has that are its own"
    import internlm_nb.run.callbacks as module

    module.save_plots = lambda run_dir: []
    seen = []

    t = trainer(run, folder, mesh=mesh)
    import internlm_nb.run.record as record

    real = record.all_reduce
    record.all_reduce = lambda x, axis, purpose, *a: (seen.append((purpose, x.numel())), real(x, axis, purpose, *a))[1]
    t.fit()
    return seen


def test_one_exchange_a_step(tmp_path):
    run = tiny_run(train_steps=4, train_device="cpu", checkpoint_every=0)
    for every, windows in ((1, 4), (3, 2)):
        got = run_ranks(
            _exchanges, Layout(2), with_fields(run, log_flush_every=every), tmp_path / str(every), timeout=180
        )
        assert got[0] == got[1] and [p for p, _ in got[0]] == ["figures of the step"] * windows


def _wrong_on_one(mesh, run, folder):
    import internlm_nb.run.callbacks as module

    module.save_plots = lambda run_dir: []

    class Wrong(Callback):
        def after_step(self, record):
            if mesh.rank == 1 and record.step == 1:
                raise KeyError("mine")

    try:
        trainer(run, folder, mesh=mesh, callbacks=[Wrong()]).fit()
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def test_a_callback_that_raises_on_one_rank_stops_all(tmp_path):
    run = tiny_run(train_steps=6, train_device="cpu", checkpoint_every=0)
    got = run_ranks(_wrong_on_one, Layout(2), run, tmp_path, timeout=180)
    assert got[1].startswith("KeyError") and got[0].startswith(
        "RankFailed: rank 1 failed while calling back after step 3: KeyError"
    )
    assert [f.step for f in steps(tmp_path / "checkpoints")] == [3]


def test_refusals_come_before_ranks_meet(monkeypatch):
    from internlm_nb.parallel.mesh import Place
    from internlm_nb.run import launch

    monkeypatch.setattr(launch, "init_distributed", lambda *a: pytest.fail("ranks have met"))
    run = with_fields(tiny_run(), train_device="cpu")
    for change, words in (
        (dict(train_attention="flash"), "flash cannot run here"),
        (dict(optim_frozen=("nothing.*",)), "no parameter matches"),
        (dict(model_hidden_size=2**20), "make the model smaller"),
        (dict(data_rampup="1 1 1"), "cannot be shared evenly"),
        (dict(optim_schedule=ScheduleConfig(init_steps=11)), "does not fit into 10 steps"),
    ):
        with pytest.raises(ValueError, match=words):
            launch.open_mesh(with_fields(run, **change), Place(0, 2, 0))
    from dataclasses import replace

    staged = replace(run, parallel=ParallelConfig(pipeline=2, schedule="zbh1"))
    with pytest.raises(ValueError, match="which compiled blocks do not"):
        launch.open_mesh(with_fields(staged, train_compile=True), Place(0, 2, 0))


# nothing good is lost


def test_a_streak_of_bad_steps_deletes_nothing(tmp_path):
    "A weight is lost after step 7: every checkpoint from before stays, and the message names the newest of them"
    run = tiny_run(train_steps=40, train_max_bad_steps=12, checkpoint_every=2, checkpoint_keep_last=2)

    class Lose(Callback):
        def before_step(self, state):
            if state.step == 7:
                t.model.head.weight.data[0, 0] = math.nan

    t = trainer(run, tmp_path, callbacks=[Lose()])
    with pytest.raises(FloatingPointError, match=r"12 steps in a row.*checkpoint.resume \S+/checkpoints/6\)"):
        t.fit()
    left = [f.step for f in steps(tmp_path / "checkpoints")]
    assert {4, 6} <= set(left) and all(
        bool(x.isfinite().all()) for n, x in tensors(tmp_path, 6).items() if n.startswith("model.")
    )
    with pytest.raises(CheckpointError, match=r"not all finite \(head.weight\).*checkpoint.resume \S+/checkpoints/6"):
        trainer(run, tmp_path)


@pytest.mark.parametrize("fields", [dict(train_max_bad_steps=0), dict(train_max_bad_steps=50)])
def test_a_dead_run_does_not_end_as_done(fields, tmp_path):
    run = tiny_run(train_steps=8, checkpoint_every=1, checkpoint_keep_last=1, **fields)

    class Lose(Callback):
        def before_step(self, state):
            if state.step == 3:
                t.model.head.weight.data[0, 0] = math.nan

    t = trainer(run, tmp_path, callbacks=[Lose()])
    with pytest.raises(FloatingPointError, match=r"weights that are not finite.*checkpoints/3"):
        t.fit()
    assert {3, 8} <= {f.step for f in steps(tmp_path / "checkpoints")}


def test_skipped_steps_at_the_end_are_no_success(tmp_path):
    said: list[str] = []
    t = trainer(tiny_run(train_steps=4, checkpoint_every=1), tmp_path, said)
    t.fit(2)
    handle = t.model.head.weight.register_hook(lambda g: g * torch.nan)
    t.fit(1)
    handle.remove()
    assert t.fit() is Stopped.DONE and any("1 of 4 steps were skipped" in line for line in said)
    t = trainer(tiny_run(train_steps=6, checkpoint_every=1), tmp_path, said)
    t.model.head.weight.register_hook(lambda g: g * torch.nan)
    with pytest.raises(FloatingPointError, match="the last 2 were skipped"):
        t.fit()


def test_the_exit_code_of_a_dead_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    with pytest.raises(SystemExit) as end:
        main(["mine.py", "--run-dir", "out", "--optim.lr", "1e30"], runs=tmp_path)
    assert end.value.code == 1 and "not finite" in capsys.readouterr().err


def test_records_that_cannot_be_written_cost_no_step(tmp_path, monkeypatch):
    "A full disk under metrics.jsonl: saved, then stopped, with the file's name"
    t = trainer(tiny_run(checkpoint_every=0), tmp_path)
    real, full = t.recorder.records.extend, []

    def extend(rows):
        if t.state.step > 4:
            full.append(1)
            raise OSError(28, "No space left on device", str(t.recorder.records.path))
        real(rows)

    monkeypatch.setattr(t.recorder.records, "extend", extend)
    with pytest.raises(OSError, match=r"No space left on device.*metrics.jsonl"):
        t.fit()
    assert [f.step for f in steps(tmp_path / "checkpoints")] == [5]


def test_what_only_describes_costs_no_step(tmp_path, monkeypatch):
    class Down(Sink):
        def write(self, record):
            raise ConnectionError("503")

    def broken(run_dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("internlm_nb.run.callbacks.save_plots", broken)
    said: list[str] = []
    run = tiny_run(train_steps=6, log_plots_every=2, train_profile_steps="1-2")
    (tmp_path / "profile").write_text("in the way")
    assert trainer(run, tmp_path, said, sinks=[Down()]).fit() is Stopped.DONE
    assert sum("no profile" in s and "steps_1-2: FileExistsError" in s for s in said) == 1
    assert [r["step"] for r in facts(tmp_path)] == list(range(6))
    assert any("Down failed: ConnectionError: 503" in s for s in said) and sum("no plots" in s for s in said) == 1


def test_a_terminal_that_is_gone_ends_nothing(tmp_path):
    def gone(line):
        raise BrokenPipeError(32, "Broken pipe")

    from internlm_nb.run.trainer import Trainer

    assert Trainer(tiny_run(train_steps=2), tmp_path, say=gone).fit() is Stopped.DONE


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_other_signals_ask_too(number, tmp_path):
    class Send(Callback):
        def before_step(self, state):
            if state.step == 2:
                os.kill(os.getpid(), number)

    t = trainer(tiny_run(checkpoint_every=0), tmp_path, callbacks=[Send()])
    assert t.fit() is Stopped.INTERRUPTED and t.state.step == 3


def test_room_is_asked_for_all_that_stand_at_once(tmp_path, monkeypatch):
    "Three are kept, so four stand while the newest is written; a run that keeps all is told what it will take"
    import internlm_nb.checkpoint.durable as durable

    size = trainer(tiny_run(), tmp_path / "first")
    one = sum(p.stat().st_size for p in Path(size.save().path).iterdir())
    real = durable.shutil.disk_usage
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda p: real(p)._replace(free=3 * one))
    with pytest.raises(CheckpointError, match="keep fewer"):
        trainer(tiny_run(train_steps=100, checkpoint_every=10), tmp_path / "many")
    said: list[str] = []
    trainer(tiny_run(train_steps=100, checkpoint_every=10, checkpoint_keep_last=1), tmp_path / "fewer", said)
    assert not any("move some away" in line for line in said)
    trainer(tiny_run(train_steps=100, checkpoint_every=10, checkpoint_keep_last=0), tmp_path / "all", said)
    assert any("move some away in time" in line for line in said)


def test_a_stranger_under_the_number_of_a_step_is_no_save(tmp_path):
    "Somebody copies a checkpoint into the folder of a run: it is not taken for the run's own, and stays"
    run = tiny_run(train_steps=6, checkpoint_every=2)
    t = trainer(run, tmp_path)
    t.fit(2)
    shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / "4")
    with pytest.raises(CheckpointError, match=r"checkpoints/4 came while the run was under way .*: move it away"):
        t.fit()
    assert [f.step for f in steps(tmp_path / "checkpoints")] == [2, 4]
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "elsewhere")
    assert trainer(run, tmp_path).fit() is Stopped.DONE


def test_a_folder_may_begin_with_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trainer(tiny_run(train_steps=1), Path("~/out")).fit() is Stopped.DONE
    assert (tmp_path / "out" / "checkpoints" / "1" / "index.json").exists()


def test_a_folder_is_held_from_construction_on(tmp_path):
    run = tiny_run()
    t = trainer(run, tmp_path)  # not fitted
    code = (
        "import sys; from pathlib import Path; from internlm_nb.run.folder import Guard\n"
        "try: Guard(Path(sys.argv[1])).take(); print('came in')\n"
        "except Exception as e: print(e)"
    )

    def other():
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "checkpoints")], capture_output=True, text=True, timeout=120
        ).stdout

    assert f"(process {os.getpid()} on" in other()
    del t
    assert "came in" in other()


@pytest.mark.parametrize("resume", ["none", "path"])
def test_a_restart_by_the_launcher_goes_on(resume, tmp_path, monkeypatch):
    "Whatever --checkpoint.resume says: the run's own newest checkpoint is meant, and nothing is put aside"
    run = tiny_run(checkpoint_every=2, checkpoint_keep_last=0)
    trainer(run, tmp_path / "old").fit(4)
    source = "none" if resume == "none" else str(tmp_path / "old" / "checkpoints" / "2")
    again = with_fields(run, checkpoint_resume=source)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    trainer(again, tmp_path / "a").fit(4)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    said: list[str] = []
    t = trainer(again, tmp_path / "a", said)
    assert t.state.step == (4 if resume == "none" else 6) and any(
        "started again by the launcher" in line for line in said
    )
    assert not (tmp_path / "a.1").exists() and not (tmp_path / "a" / "checkpoints" / "superseded").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")  # a launch of its own begins as it says
    del t
    assert trainer(again, tmp_path / "a").state.step == (0 if resume == "none" else 2)


def test_a_rate_that_jumps_up_is_said(tmp_path):
    run = tiny_run(train_steps=6, checkpoint_every=3)
    trainer(run, tmp_path).fit()
    said: list[str] = []
    trainer(with_fields(run, train_steps=12), tmp_path, said)
    (warning,) = [line for line in said if line.startswith("WARNING: the learning rate jumps up")]
    assert "--optim.schedule.kind constant" in warning and "--checkpoint.init" in warning
    constant = with_fields(run, schedule=ScheduleConfig(kind="constant"))
    assert not reheated(constant, with_fields(constant, train_steps=12), 6)


# long runs


def test_the_end_of_a_long_file_is_enough(tmp_path):
    "What stays is not read; what goes, and what is broken, is set aside"
    path = tmp_path / "metrics.jsonl"
    for cut, torn in ((90, b""), (10, b""), (95, b'{"step": 100, "lo')):
        path.write_bytes(b"".join(b'{"step": %d, "loss": 1.0}\n' % k for k in range(100)) + torn)
        head = path.read_bytes()[:200]
        (tmp_path / "metrics.dropped.jsonl").unlink(missing_ok=True)
        assert keep_before(path, cut, tail=100) == 100 - cut + bool(torn)
        assert [r["step"] for r in read_metrics(path)] == list(range(cut)) and path.read_bytes()[:200] == head[
            : len(path.read_bytes())
        ]
        dropped = (tmp_path / "metrics.dropped.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in dropped if line.endswith("}")] == list(range(cut, 100))
    assert [r["step"] for r in sample_metrics(path, most=10, small=10)][-1] == 94


def test_a_million_records_are_resumed_in_seconds(tmp_path):
    "A file of 250 MB: only its end is read, and a picture takes some thousand of its lines"
    path, block = tmp_path / "metrics.jsonl", 10_000
    with path.open("wb") as file:
        for first in range(0, 1_000_000, block):
            lines = (b'{"step": %d, "loss": 1.25, "more": "%s"}\n' % (first + k, b"x" * 200) for k in range(block))
            file.write(b"".join(lines))
    size, begin = path.stat().st_size, time.process_time()
    tracemalloc.start()
    sink = JsonlSink(tmp_path, start_step=999_500)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sink.dropped == 500 and most < 2**27 and path.stat().st_size < size
    sampled = sample_metrics(tmp_path)
    assert sampled[-1]["step"] == 999_499 and 3000 < len(sampled) < 5000
    assert time.process_time() - begin < 20  # about 1 where nothing else is at work


# trackers


OWN_TRACKER = """

class Book:
    "A tracker that keeps what it is told in a file"
    def init(self, **options): self.note("init", options["name"])
    def log(self, figures, step): self.note(step, "loss" if "loss" in figures else "valid_loss")
    def finish(self): self.note("finish")
    def note(self, *what):
        with open("book.txt", "a") as file:
            print(*what, file=file)


def sinks(run):
    from internlm_nb.observe.trackers import TrackerSink

    return [TrackerSink(Book(), "mine", run.name, {})]
"""


def test_a_tracker_of_a_run_file(tmp_path, monkeypatch):
    "It is opened before the first step, and steps and validations that are done again are not told twice"
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN + OWN_TRACKER)
    options = ["--train.valid-every", "2", "--checkpoint.every", "2", "--log.sinks", "jsonl"]
    main(["mine.py", "--train.steps", "4", "--run-dir", "run", *options])
    first = Path("book.txt").read_text().split("\n")[:-1]
    assert first[0] == "init mine" and first[-1] == "finish"
    told = {f"{step} loss" for step in range(4)} | {f"{step} valid_loss" for step in (0, 2, 4)}
    assert sorted(first[1:-1]) == sorted(told)
    with open("run/metrics.jsonl", "a") as file:  # killed while step 4 was written
        file.write('{"step": 4, "lo')
    os.rename("run/checkpoints/4", "four")
    main(["mine.py", "--train.steps", "6", "--run-dir", "run", *options])
    again = Path("book.txt").read_text().split("\n")[len(first) : -1]
    assert again == ["init mine", "4 loss", "5 loss", "6 valid_loss", "finish"]


def test_a_tracker_that_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text("raise RuntimeError('made for another Python')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ValueError, match=r"--log.sinks trackio: .*made for another Python.*mend it, or leave it out"):
        trainer(tiny_run(log_sinks=("trackio",)), tmp_path / "run")


def test_tries_that_take_long_are_rare():
    "A service that is waited for in vain takes a twentieth of the time; the remark names it, and it is closed"

    class Away(Sink):
        name, tries, closed = "service", 0, False

        def write(self, record):
            self.tries += 1
            now[0] += 30.0
            raise TimeoutError("no answer")

        def close(self):
            self.closed = True

    now, said, away = [0.0], [], Away()
    guarded = Guarded(away, said.append, clock=lambda: now[0])
    while now[0] < 36_000:
        guarded.write({"step": 0})
        now[0] += 1.0
    assert 40 <= away.tries <= 60
    assert said == ["service failed: TimeoutError: no answer. The run goes on, and it is tried again"]
    guarded.close()
    assert away.closed and said[-1].startswith("service did not take the last")

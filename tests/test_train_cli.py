"scripts/train.py as its user meets it: what is wrong is named before work starts, signals are obeyed, a run is found again"

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_runs import facts, same, starts, tiny_run, trainer, write_folder

from internlm_nb.apps.pretrain import main
from internlm_nb.apps.runfile import names_of, shipped_runs
from internlm_nb.checkpoint.keep import read_best, steps

ROOT = Path(__file__).parents[1]
RUNS = shipped_runs()
OWN = """
"A run of my own"
from __future__ import annotations

from dataclasses import dataclass

from internlm_nb.data.loader import DataConfig
from internlm_nb.model.config import ModelConfig
from internlm_nb.train.config import CheckpointConfig, LogConfig, RunConfig, TrainConfig
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.schedules import ScheduleConfig


@dataclass
class Mine:
    "A user's file may define what it likes"
    width: int = 32


def run() -> RunConfig:
    model = ModelConfig(family="internlm2", vocab_size=97, hidden_size=Mine().width, num_layers=2, num_heads=4, num_kv_heads=2, mlp_ratio=2.0, multiple_of=16)
    return RunConfig("mine", model, DataConfig(seq_len=32, micro_bsz=2, micro_num=2, valid_packs=2), OptimConfig(lr=3e-3, schedule=ScheduleConfig(warmup_ratio=0.2)),
        TrainConfig(steps=10, precision="float32"), CheckpointConfig(every=5), LogConfig(sinks=("console",), progress=False, peak_tflops=1.0))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a run file, wrong run files, and good and broken token folders"
    root = tmp_path_factory.mktemp("cli")
    (root / "mine.py").write_text(OWN)
    (root / "norun.py").write_text("x = 1")
    (root / "broken.py").write_text("import nothing_there")
    (root / "syntax.py").write_text("def run(:")
    (root / "returns.py").write_text("def run(): return 3")
    (root / "fails.py").write_text("def run(): return {}['a']")
    short = "from mine import run as mine\nfrom dataclasses import replace\ndef run():\n    {}\n"
    (root / "wrongkey.py").write_text(
        short.format("return replace(mine(), model=replace(mine().model, hidden_sise=3))")
    )
    (root / "wrongvalue.py").write_text(
        short.format("return replace(mine(), optim=replace(mine().optim, lr=float('nan')))")
    )
    (root / "wrongimport.py").write_text("from internlm_nb.train.config import LogConfg\ndef run(): pass\n")
    (root / "wronghook.py").write_text(short.format("return mine()") + "sinks = 3\n")
    (root / "wrongsinks.py").write_text(short.format("return mine()") + "\n\ndef sinks():\n    return [one]\n")
    (root / "wrongprepare.py").write_text(short.format("return mine()") + "def prepare(run):\n    pass\n")
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    (root / "foreign").mkdir()
    (root / "foreign" / "config.json").write_text("[1]")
    for name in ("good", "cut", "lonely", "json"):
        write_folder(root / name, kinds=("en",), count=20)
    write_folder(root / "big", kinds=("en",), top=500)
    path = root / "cut" / "en" / "a.bin"
    path.write_bytes(path.read_bytes()[:-9])
    (root / "lonely" / "en" / "a.bin.meta").unlink()
    path = root / "json" / "en" / "a.bin"
    path.write_bytes(path.read_bytes().replace(b",", b";", 1))
    trainer(tiny_run(train_steps=2), root / "done").fit(2)
    return root


def call(place, line, monkeypatch):
    "Run main as the script would: (exit code, standard output, standard error)"
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(shlex.split(line), runs=RUNS)
            code = 0
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


WRONG = [  # the line, and words that the message must have: what is wrong, and what to write
    ("demoo", "no run 'demoo' Did you mean demo"),
    ("nothere.py", "no such file"),
    ("empty", "no run 'empty' path of a Python file"),
    ("norun.py", "norun.py has no function run()"),
    ("broken.py", "broken.py nothing_there"),
    ("syntax.py", "syntax.py SyntaxError"),
    ("returns.py", "returns.py returned int RunConfig"),
    ("fails.py", "fails.py KeyError"),
    ("--train.steps 5 mine.py", "name a run first"),
    ("", "RUN_OR_FILE"),
    ("mine.py extra", "extra"),
    ("mine.py --train.stepz 3", "--train.stepz Perhaps you meant --train.steps"),
    ("mine.py --steps 3", "--steps Perhaps you meant --train.steps"),
    ("mine.py --train.steps many", "--train.steps many"),
    ("mine.py --train.steps 0", "--train.steps is 0 at least 1"),
    ("mine.py --train.precision half", "half float16"),
    ("mine.py --train.recompute 2", "--train.recompute is 2 from 0 to 1"),
    ("mine.py --train.attention flish", "flish flash varlen sdpa reference"),
    ("mine.py --train.attention flash", "flash cannot run here"),
    ("mine.py --train.device tpu", "tpu cuda:N"),
    ("mine.py --train.device cuda:99", "cuda:99"),
    ("mine.py --train.profile-steps 5-3", "5-3 3-5,9"),
    ("mine.py --train.max-bad-steps -1", "--train.max-bad-steps"),
    ("mine.py --train.loss-scale.init 0", "loss scale 0 < min <= init <= max"),
    ("mine.py --train.loss-scale.hysteresis 0", "hysteresis at least 1"),
    ("mine.py --model.num-heads 3", "num_heads 3 does not divide"),
    ("mine.py --model.num-layers 0", "num_layers is 0"),
    ("mine.py --data.seq-len 0", "--data.seq-len is 0 at least 1"),
    ("mine.py --data.micro-num 0", "--data.micro-num is 0 at least 1"),
    ("mine.py --data.seq-len 1000000000", "--data.micro-num 2 packs of --data.seq-len 1000000000 GB of a rank's memory"),
    ("mine.py --data.seq-len 10000000000", "--data.seq-len at most 2,147,483,647"),
    ("mine.py --data.prefetch 1000000000000", "--data.prefetch 1000000000000 GB of a rank's memory"),
    ("mine.py --train.max-minutes inf", "--train.max-minutes is inf 0 means no limit"),
    ("mine.py --zero.param 2", "write --zero.param 2 --zero.grad 2 --zero.optim 2"),
    ("mine.py --parallel.pipeline 2", "--parallel.pipeline 2 torchrun --nproc-per-node 2"),
    ("mine.py --parallel.schedule zbh1", "--parallel.schedule is zbh1 --parallel.pipeline is 1"),
    ("mine.py --data.rampup '5 1 1'", "rampup start between 1 and the batch of 2 packs"),
    ("mine.py --data.skip-batches a", "--data.skip-batches 3-5,9"),
    ("mine.py --data.train-folder nope", "nope neither a folder"),
    ("mine.py --data.train-folder empty", "empty no .bin files prepare_data.py build"),
    ("mine.py --data.train-folder big", "a.bin, line vocabulary of 97 another tokenizer"),
    ("mine.py --data.train-folder cut", "a.bin, line truncated"),
    ("mine.py --data.train-folder lonely", "a.bin.meta missing"),
    ("mine.py --data.train-folder json", "a.bin, line"),
    ("mine.py --data.train-folder good --train.valid-every 2", "--train.valid-every --data.valid-folder"),
    ("mine.py --data.train-folder good --data.valid-folder nope", "--data.valid-folder nope"),
    ("mine.py --data.train-folder good --data.valid-folder big --train.valid-every 2", "big a.bin, line vocabulary of 97"),
    ("mine.py --optim.lr -1", "--optim.lr is -1"),
    ("mine.py --optim.lr nan", "--optim.lr is nan"),
    ("mine.py --optim.beta1 1", "--optim.beta1 below 1"),
    ("mine.py --optim.beta2-c -1", "--optim.beta2-c"),
    ("mine.py --optim.clip -1", "--optim.clip is -1"),
    ("mine.py --optim.weight-decay -1", "--optim.weight-decay"),
    ("mine.py --optim.frozen nothing.*", "--optim.frozen nothing.* Names look like"),
    ("mine.py --optim.frozen *", "no parameter to train"),
    ("mine.py --optim.own-lr head.*", "--optim.own-lr PATTERN=LR"),
    ("mine.py --optim.own-lr head.*=-1", "--optim.own-lr PATTERN=LR"),
    ("mine.py --optim.schedule.init-steps 11", "the schedule does not fit into 10 steps"),
    ("mine.py --optim.schedule.kind wsd --optim.schedule.warmup-ratio 0.7 --optim.schedule.decay-ratio 0.5", "the schedule does not fit"),
    ("mine.py --checkpoint.init nope", "nope no such checkpoint index.json"),
    ("mine.py --checkpoint.init good", "good index.json not a complete checkpoint"),
    ("mine.py --checkpoint.init done --model.num-layers 1", "no place for model.blocks.1 --model"),
    ("mine.py --checkpoint.init done --model.vocab-size 98", "does not fit embedding.weight"),
    ("mine.py --checkpoint.resume nope", "nope no such checkpoint auto none"),
    ("mine.py --checkpoint.resume done --train.steps 1", "--train.steps is 1 has made 2 steps"),
    ("mine.py --checkpoint.keep-last -1", "--checkpoint.keep-last"),
    ("mine.py --log.sinks wandd", "wandd console tensorboard trackio wandb"),
    ("mine.py --log.every -1", "--log.every is -1"),
    ("mine.py --log.flush-every 0", "--log.flush-every is 0"),
    ("mine.py --log.plots-every -1", "--log.plots-every"),
    ("mine.py --name a/b --run-dir out", "--name a/b --run-dir"),
    ("mine.py --run-dir /proc/x", "/proc/x cannot be written another folder"),
    ("mine.py --run-dir file/x", "file cannot be written"),
    ("mine.py --run-dir foreign", "foreign/config.json is no run's"),
    ("internlm-20b", "--parallel.tensor 4 one process was started torchrun --nproc-per-node 4 internlm-train --nproc 4"),
    ("internlm-7b", "--zero.optim 8 optim 8 does not divide 1 write --zero.param 1 one process was started internlm-train --nproc 8"),
    ("internlm2-7b", "internlm2-7b needs data --data.train-folder TOKENS --data.train-folder synthetic"),
    ("internlm2-7b --data.train-folder synthetic --train.device cpu", "internlm2-7b needs GB make the model smaller"),
    ("sft", "sft needs data --data.train-folder"),
    ("mine.py --nproc -1", "--nproc is -1"),
    ("wrongkey.py", "wrongkey.py, line 4 hidden_sise Did you mean hidden_size?"),
    ("wrongimport.py", "wrongimport.py, line 1 LogConfg Did you mean LogConfig?"),
    ("wrongvalue.py", "wrongvalue.py, line 4 --optim.lr is nan"),
    ("wronghook.py", "wronghook.py sinks is int it must be a function"),
    ("wrongsinks.py", "wrongsinks.py, line 8, in sinks() NameError one"),
    ("wrongprepare.py", "wrongprepare.py prepare() returned NoneType, not a RunConfig"),
]  # fmt: skip


@pytest.mark.parametrize("line,words", WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_wrong_is_named_before_work_starts(line, words, place, monkeypatch):
    before = sorted(place.rglob("*"))
    code, out, err = call(place, line + (" --run-dir out" if line and "--run-dir" not in line else ""), monkeypatch)
    said = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", err if line else out))
    assert code == 2 and "step=0" not in out
    missing = [w for w in words.split() if w not in said and w not in said.replace(" ", "")]
    assert not missing, said
    assert "Traceback" not in err or "broken.py" in line or "syntax.py" in line
    assert sorted(p for p in place.rglob("*") if "__pycache__" not in p.parts) == [
        p for p in before if "__pycache__" not in p.parts
    ]


def test_help_lists_every_field(place, monkeypatch):
    "With its type, its comment and the run's own value"
    code, out, _ = call(place, "--help", monkeypatch)
    assert code == 0 and all(name in out for name in names_of(RUNS))
    code, out, _ = call(place, "mine.py --help", monkeypatch)
    from internlm_nb.train.config import flatten

    assert (
        code == 0
        and all("--" + name.replace("_", "-") in out for name, _ in flatten(tiny_run()))
        and "(default: 10)" in out
    )


@pytest.mark.usefixtures("no_plots")
def test_own_file_and_overrides(place, monkeypatch, tmp_path):
    "A user's file by its path, fields overridden, everything written where asked"
    code, out, err = call(
        place,
        f"mine.py --run-dir {tmp_path}/r --train.steps 3 --data.micro-num 1 --optim.lr 1e-3 --data.train-folder good --log.sinks console --log.line keys",
        monkeypatch,
    )
    assert code == 0, err
    saved = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (
        saved["run"]["optim"]["lr"] == 1e-3
        and saved["run"]["data"]["train_folder"] == ["good"]
        and "--data.micro-num 1" in saved["command"]
    )
    assert {"python", "torch", "internlm_nb"} <= saved["versions"].keys()
    assert out.count("tgs (tokens/gpu/second)=") == 3 and len(facts(tmp_path / "r")) == 3
    assert "all steps are made at step 3 of 3" in out


@pytest.mark.usefixtures("no_plots")
def test_no_room(place, monkeypatch, tmp_path):
    "A disk without room is named before the first step; one that fills up on the way ends the run with code 1 and every checkpoint whole"
    import internlm_nb.checkpoint.durable as durable

    real = durable.shutil.disk_usage
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda p: real(p)._replace(free=1000))
    code, _, err = call(place, f"mine.py --run-dir {tmp_path}/r", monkeypatch)
    assert code == 2 and "needs 595 kB" in err and "1 kB free" in err and not (tmp_path / "r").exists()
    monkeypatch.setattr(durable.shutil, "disk_usage", real)
    fsync, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if (tmp_path / "r" / "checkpoints" / "2").exists():
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = call(place, f"mine.py --run-dir {tmp_path}/r --checkpoint.every 2", monkeypatch)
    assert code == 1 and "stopped after step 4" in err and "No space left" in err
    assert [f.step for f in steps(tmp_path / "r" / "checkpoints")] == [2]


@pytest.mark.usefixtures("no_plots")
def test_without_tensorboard(place, monkeypatch, tmp_path):
    "The run works without the package, and says so"
    import importlib.util

    import internlm_nb.observe.outputs as module

    real = importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else real(name, *a)
    )
    code, out, _ = call(
        place, f"mine.py --run-dir {tmp_path}/r --train.steps 2 --log.sinks console tensorboard", monkeypatch
    )
    assert code == 0 and "no TensorBoard files: pip install" in out and not (tmp_path / "r" / "tensorboard").exists()


# the real script, in a process of its own


def start(*args, cwd):
    "A background job of a script ignores SIGINT, and so would the children that it starts: here it does what it does in a terminal"
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(path: Path, lines: int, process) -> None:
    "Until a jsonl file has so many lines"
    for _ in range(6000):
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{path} never had {lines} lines")


def test_script_signals_and_resume(place, tmp_path):
    "SIGTERM, then SIGINT, to scripts/train.py: saved, code 0; the same command goes on; in the end it is the run that was left alone"
    options = [
        "mine.py",
        "--train.steps",
        "60",
        "--train.valid-every",
        "20",
        "--checkpoint.every",
        "0",
        "--data.micro-num",
        "3",
    ]
    for i, number in enumerate((signal.SIGTERM, signal.SIGINT)):
        p = start(*options, "--run-dir", tmp_path / "b", cwd=place)
        wait_for(tmp_path / "b" / "metrics.jsonl", 3 + 12 * i, p)
        p.send_signal(number)
        out, err = p.communicate(timeout=60)
        assert p.returncode == 0, err
        assert "interrupted at step" in out and "the same command goes on from there" in out
    with pytest.MonkeyPatch.context() as m:
        m.setattr("internlm_nb.run.callbacks.save_plots", lambda d: [d / "plots" / "none"])
        assert call(place, shlex.join([*options, "--run-dir", str(tmp_path / "b")]), m)[0] == 0
        assert call(place, shlex.join([*options, "--run-dir", str(tmp_path / "a")]), m)[0] == 0
    same(tmp_path / "a", tmp_path / "b", 60)
    assert read_best(tmp_path / "a" / "checkpoints") == read_best(tmp_path / "b" / "checkpoints")
    came = [s["step"] for s in starts(tmp_path / "b")]
    assert came[0] == 0 and came == sorted(set(came)) and len(came) == 3


def test_script_second_interrupt(place, tmp_path):
    "Two at once: stops at once with code 130 and no traceback, and the earlier checkpoint is whole"
    p = start(
        "mine.py",
        "--train.steps",
        "100000",
        "--checkpoint.every",
        "3",
        "--run-dir",
        tmp_path / "b",
        "--model.num-layers",
        "8",
        cwd=place,
    )
    wait_for(tmp_path / "b" / "metrics.jsonl", 5, p)
    p.send_signal(signal.SIGSTOP)  # so that both are there when it wakes
    p.send_signal(signal.SIGINT)
    os.kill(p.pid, signal.SIGCONT)
    time.sleep(0.002)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode in (0, 130) and "Traceback" not in err, err  # 0: the step was over before the second one came
    assert p.returncode == 0 or "stopped at once" in err
    assert steps(tmp_path / "b" / "checkpoints")


# the other functions of a run file

HOOKED = """
from dataclasses import replace
from pathlib import Path

from mine import run as mine

from internlm_nb.observe.sinks import Sink


class Count(Sink):
    def write(self, record):
        with open("heard", "a") as f:
            f.write(f"{record['step']}\\n")


def run():
    return replace(mine(), train=replace(mine().train, steps=3))


def sinks():
    return [Count()]


def finish(trainer):
    Path("finished").write_text(str(trainer.state.step))
"""


@pytest.mark.usefixtures("no_plots")
def test_a_run_file_may_have_sinks_and_an_end(place, monkeypatch, tmp_path):
    (tmp_path / "hooked.py").write_text(HOOKED)
    monkeypatch.syspath_prepend(str(place))
    code, _, err = call(tmp_path, f"hooked.py --run-dir {tmp_path}/r", monkeypatch)
    assert code == 0, err
    assert (tmp_path / "heard").read_text().split() == ["0", "1", "2"] and (tmp_path / "finished").read_text() == "3"
    (tmp_path / "bad.py").write_text(HOOKED.replace("Path(", "Pth("))
    code, _, err = call(tmp_path, f"bad.py --run-dir {tmp_path}/s", monkeypatch)
    assert (
        code == 1
        and "the run is complete, but its finish() failed" in err
        and "bad.py, line 25, in finish()" in err
        and "Did you mean Path?" in err
    )
    assert [f.step for f in steps(tmp_path / "s" / "checkpoints")] == [3]


@pytest.mark.usefixtures("no_plots")
def test_callbacks_and_ends_that_are_none(place, monkeypatch, tmp_path):
    "callbacks() reach the trainer; an end that is no good one has exit code 1"
    import internlm_nb.apps.pretrain as module

    class Ending:
        name, value = "BROKEN", "the weights are not finite"

    class Broken(module.Trainer):
        def __init__(self, *args, callbacks=(), **kwargs):
            super().__init__(*args, **kwargs)
            self.given = callbacks

        def fit(self, steps=None):
            assert self.given == ["one"]
            super().fit(steps)
            return Ending

    (tmp_path / "called.py").write_text(HOOKED + "\n\ndef callbacks():\n    return ['one']\n")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(module, "Trainer", Broken)
    code, _, err = call(tmp_path, f"called.py --run-dir {tmp_path}/r", monkeypatch)
    assert code == 1 and "the weights are not finite at step 3 of 3" in err and not (tmp_path / "finished").exists()


@pytest.mark.usefixtures("no_plots")
def test_a_whole_model_is_made_for_the_end(place, monkeypatch, tmp_path):
    "Where the trainer can gather the weights, finish() is called inside of it"
    import internlm_nb.apps.pretrain as module

    class Gathers(module.Trainer):
        @contextlib.contextmanager
        def whole_model(self):
            (tmp_path / "gathered").write_text("")
            yield
            assert (tmp_path / "finished").exists()

    (tmp_path / "hooked.py").write_text(HOOKED)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(module, "Trainer", Gathers)
    assert call(tmp_path, f"hooked.py --run-dir {tmp_path}/r", monkeypatch)[0] == 0
    assert (tmp_path / "gathered").exists()

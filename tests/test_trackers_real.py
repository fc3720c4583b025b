"trackio and W&B themselves, offline, hold what metrics.jsonl and validation.jsonl say, each step once"

from __future__ import annotations

import importlib.util
import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import matplotlib
import pytest
from test_train_cli import OWN
from train_runs import TIMES

from internlm_nb.observe.sinks import VALIDATION_FILE, read_metrics

TESTS = Path(__file__).parent
LACKING = [name for name in ("trackio", "wandb") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"not installed: {' '.join(LACKING)}; run bash scripts/dev/extras.sh"),
]
TRACKERS = ["trackio", "wandb"]


@pytest.fixture
def env(tmp_path):
    "Where children find and leave things: no home but this one, and no network"
    wandb = {f"WANDB_{what}_DIR": str(tmp_path / "wandb" / what.lower()) for what in ("CACHE", "CONFIG", "DATA")}
    own = {"HOME": str(tmp_path / "home"), "TRACKIO_DIR": str(tmp_path / "trackio")}
    own["PYTHONPATH"] = f"{TESTS.parent}{os.pathsep}{TESTS}"
    (tmp_path / "home").mkdir()
    (tmp_path / "mine.py").write_text(OWN)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_", "HF_TOKEN", "XDG_"))}
    return kept | own | wandb | {"MPLCONFIGDIR": matplotlib.get_cachedir(), "PYTHONUNBUFFERED": "1"}


def python(env: dict[str, str], folder: Path, *command: str, code: int = 0) -> str:
    "What a child says; it ends as expected"
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=env, cwd=folder)
    assert done.returncode == code, (done.stdout + done.stderr)[-5000:]
    return done.stdout + done.stderr


def cli(env: dict[str, str], folder: Path, options: str) -> str:
    return python(env, folder, "-m", "internlm_nb.apps.pretrain", "mine.py", "--run-dir", "run", *options.split())


def scripted(env: dict[str, str], folder: Path, name: str, text: str, code: int = 0) -> str:
    "A child that has `make()`, a trainer of a tiny run of six steps, which saves and validates after each second"
    start = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom train_runs import tiny_run, trainer\n"
        "from internlm_nb.run.callbacks import Callback\n"
        "def make(resume='auto', **kw):\n"
        "    run = tiny_run(train_steps=6, train_valid_every=2, checkpoint_every=2, checkpoint_resume=resume,\n"
        f"        log_sinks=({name!r},))\n"
        "    return trainer(run, Path('run'), **kw)\n"
    )
    return python(env, folder, "-c", start + text, code=code)


def trackio_runs(folder: Path, project: str) -> dict[str, list[tuple[int, dict]]]:
    "(step, figures) of each run, as they stand in trackio's database"
    runs: dict[str, list[tuple[int, dict]]] = {}
    with sqlite3.connect(folder / "trackio" / f"{project}.db") as db:
        for name, step, figures in db.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"):
            runs.setdefault(name, []).append((step, json.loads(figures)))
    return runs


def wandb_records(path: Path):
    "Records of a .wandb file: a header, then blocks of 32 KiB that hold pieces with a checksum, a length and a type"
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its last piece
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_runs(run_dir: Path) -> dict[str, list[tuple[int, dict]]]:
    "(step, figures) of each run, as they stand in the files that `wandb sync` sends"
    runs: dict[str, list[tuple[int, dict]]] = {}
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        records = list(wandb_records(path))
        name = next((r.run.display_name for r in records if r.HasField("run")), "")
        for record in records:
            if record.HasField("history"):  # a kill may leave an empty file
                figures = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                runs.setdefault(name, []).append((int(figures["_step"]), figures))
    return runs


def runs_of(name: str, folder: Path, project: str = "tiny") -> dict[str, list[tuple[int, dict]]]:
    return trackio_runs(folder, project) if name == "trackio" else wandb_runs(folder / "run")


def told(rows: list[tuple[int, dict]], key: str) -> list[int]:
    "The steps that have a figure"
    return [step for step, figures in rows if key in figures]


def agrees(rows: list[tuple[int, dict]], run_dir: Path, but: Collection[str] = ()) -> None:
    "Each step's and each validation's finite numbers stand in the tracker, as they are, once"
    for file, key in (("metrics.jsonl", "loss"), (VALIDATION_FILE, "valid_loss")):
        records = read_metrics(run_dir / file)
        assert told(rows, key) == [r["step"] for r in records]
        for record, figures in zip(records, [figures for _, figures in rows if key in figures], strict=True):
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and math.isfinite(v)}
            numbers = {k: v for k, v in numbers.items() if k != "step" and k not in but}
            assert numbers and {k: figures.get(k) for k in numbers} == numbers


@pytest.mark.parametrize("name", TRACKERS)
def test_the_command_line(name, tmp_path, env):
    "Two calls, the second of which goes on: one run there, with all figures, and it is said where to look"
    line = f"--train.steps 4 --train.valid-every 2 --checkpoint.every 2 --log.sinks console tensorboard {name}"
    said = cli(env, tmp_path, line)
    assert "step 4/4" in said and ('trackio show --project "mine"' if name == "trackio" else "wandb sync") in said
    cli(env, tmp_path, line.replace("steps 4", "steps 6"))
    (rows,) = runs_of(name, tmp_path, "mine").values()
    agrees(rows, tmp_path / "run")
    assert told(rows, "loss") == [0, 1, 2, 3, 4, 5] and told(rows, "valid_loss") == [0, 2, 4, 6]
    at_home = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [path for path in at_home if "trackio" in path or "wandb" in path]


def test_all_sinks_at_once(tmp_path, env):
    cli(env, tmp_path, "--train.steps 3 --train.valid-every 3 --log.sinks console tensorboard trackio wandb")
    for name in TRACKERS:
        (rows,) = runs_of(name, tmp_path, "mine").values()
        agrees(rows, tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_breaks_goes_on(name, tmp_path, env):
    "It breaks off after its second validation, and goes on from the first one: nothing is told twice"
    broken = "class Break(Callback):\n    def before_step(self, state):\n        if state.step == 4: 1 / 0\n"
    scripted(env, tmp_path, name, broken + "make(callbacks=[Break()]).fit()", code=1)
    for path in list((tmp_path / "run" / "checkpoints").iterdir()):
        if path.name.isdigit() and int(path.name) > 2:
            path.rename(tmp_path / path.name)
    scripted(env, tmp_path, name, "t = make()\nassert t.state.step == 2\nt.fit()")
    (rows,) = runs_of(name, tmp_path).values()
    agrees(rows, tmp_path / "run", but=TIMES)  # it has those of the first time
    assert len((tmp_path / "run" / "metrics.dropped.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", TRACKERS)
def test_a_killed_run_goes_on(name, tmp_path, env):
    "What was not yet written is lacking; no step is there twice, and all that comes after the kill is there"
    kill = (
        "class Kill(Callback):\n    def before_step(self, state):\n"
        "        if state.step == 4: time.sleep(1.5)\n"
        "        if state.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    scripted(env, tmp_path, name, kill + "make(callbacks=[Kill()]).fit()", code=-9)
    scripted(env, tmp_path, name, "make().fit()")
    (rows,) = runs_of(name, tmp_path).values()
    steps = told(rows, "loss")
    assert len(set(steps)) == len(steps) and ({0, 1, 2, 5} if name == "trackio" else {5}) <= set(steps) <= set(range(6))
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(6))


@pytest.mark.parametrize("name", TRACKERS)
def test_pauses_and_new_beginnings(name, tmp_path, env):
    "Several calls of fit are one run there; a run that begins anew in the same folder is another"
    scripted(env, tmp_path, name, "t = make()\nt.fit(2)\nt.fit(1)\nt.fit()")
    (rows,) = runs_of(name, tmp_path).values()
    agrees(rows, tmp_path / "run")
    scripted(env, tmp_path, name, "make(resume='none').fit()")
    runs = runs_of(name, tmp_path)
    agrees(list(runs.values())[-1], tmp_path / "run")
    assert len(runs) == (2 if name == "trackio" else 1)  # W&B's files of the first went aside with its folder
    if name == "wandb":
        assert runs.keys().isdisjoint(wandb_runs(tmp_path / "run.1")) and wandb_runs(tmp_path / "run.1")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_without_a_place(name, tmp_path, env):
    "Where it wants to write there is a file: that is said, and the run is whole"
    (tmp_path / "trackio").write_text("in the way")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("in the way")
    said = cli(env, tmp_path, f"--train.steps 3 --log.sinks console {name}")
    assert "step 3/3" in said and name in said.lower()
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [0, 1, 2]

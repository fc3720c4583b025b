"What pip installs: commands that exist, runs that start on the ranks which they name, a wheel with all of it"

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from internlm_nb.apps.runfile import (
    NOISE,
    UsageError,
    load_run_file,
    names_of,
    parse_run,
    require_data,
    shipped_runs,
    with_noise,
)
from internlm_nb.data.loader import Loader
from internlm_nb.model.config import num_params
from internlm_nb.run.preflight import check_batch, memory_needed
from internlm_nb.train.parallelize import layout_of
from internlm_nb.train.schedules import acts

ROOT = Path(__file__).parents[1]
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT / "settings.ini", encoding="utf-8")
COMMANDS = dict(word.split("=") for word in shlex.split(CFG["DEFAULT"]["console_scripts"]))
DEVICE_BYTES, LEFT_FOR_ACTIVATIONS = 80e9, 15e9


def test_commands_are_named_as_users_expect():
    assert {"internlm-train", "internlm-data", "internlm-convert", "internlm-chat", "internlm-bench"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_a_function_that_helps(command, capsys, monkeypatch):
    "Each entry point can be imported and called as pip's wrapper does it, and calls itself by the command's name"
    module, function = COMMANDS[command].split(":")
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command}", "--help"])
    with pytest.raises(SystemExit) as stop:
        sys.exit(getattr(importlib.import_module(module), function)())
    assert not stop.value.code
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    "module", [f"internlm_nb.{m}" for m in ("apps.pretrain", "apps.prepare", "apps.convert", "apps.chat", "bench.cli")]
)
def test_a_module_is_a_program(module):
    "`python -m MODULE` does the same: its file ends with the call, behind a guard that a notebook does not pass"
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    assert re.search(
        r'^if __name__ == "__main__" and "__file__" in globals\(\):.*\n    sys\.exit\((cli|main)\(\)\)\n$',
        path.read_text(),
        flags=re.M,
    ), path


def worlds(doc: str) -> list[int]:
    "Numbers of ranks that a shipped run names"
    said = re.match(r"Worlds: ([\d, or]+) (GPUs of 80 GB|process)\b", doc.splitlines()[2])
    assert said, doc
    return [int(n) for n in re.findall(r"\d+", said[1])]


@pytest.mark.parametrize("name", names_of(shipped_runs()))
def test_shipped_runs_start_on_their_worlds(name):
    "Layout, batch, schedule and memory, all in closed form: nothing is allocated"
    module = load_run_file(name)
    run = parse_run(module, [])
    assert run.name == name
    acts(run.train.steps, run.optim.schedule)
    for world in worlds(module.__doc__ or ""):
        layout = layout_of(run, world)
        Loader(run.data, run.train.seed, run.model.vocab_size).check_ranks(layout.data)
        check_batch(run, layout.data)
        assert memory_needed(run, layout) < DEVICE_BYTES - LEFT_FOR_ACTIVATIONS, (name, world)


def test_recipes_are_what_they_say():
    "Tokens a step and in all, of those whose docstring names them"
    for name, step, tokens in (
        ("internlm-7b", 131_072, 6.6e9),
        ("internlm2-7b", 4.2e6, 2.1e12),
        ("internlm2-20b", 5.2e6, 2.6e12),
        ("sft", 16_384, 1.6e7),
    ):
        run = load_run_file(name).run()
        a_step = run.data.packed_length * run.data.micro_num
        assert a_step == pytest.approx(step, rel=0.02) and a_step * run.train.steps == pytest.approx(
            tokens, rel=0.03
        ), name
    assert num_params(load_run_file("internlm-7b").run().model) == 7_321_948_160


@pytest.mark.parametrize("name", sorted(set(names_of(shipped_runs())) - {"demo"}))
def test_shipped_runs_do_not_train_on_noise_unasked(name):
    module = load_run_file(name)
    with pytest.raises(
        UsageError, match=rf"{re.escape(name)} needs data: --data.train-folder TOKENS.*--data.train-folder synthetic"
    ):
        require_data(module.run(), module)
    run, noise = with_noise(parse_run(module, ["--data.train-folder", NOISE]))
    assert noise and run.data.train_folder == ()
    require_data(run, module, noise)
    run, noise = with_noise(parse_run(module, ["--data.train-folder", "tokens"]))
    assert not noise and run.data.train_folder == ("tokens",)
    require_data(run, module)


def test_constraints_are_within_the_requirements():
    "CI's PyTorch is one that users may have, and the requirement has no upper end"
    asked = next(word for word in shlex.split(CFG["DEFAULT"]["requirements"]) if word.startswith("torch"))
    assert re.fullmatch(r"torch>=\d+\.\d+", asked)
    pinned = re.search(r"^torch==([\d.]+)\+cpu$", (ROOT / ".ci/constraints.txt").read_text(), flags=re.M)
    assert pinned and [int(n) for n in pinned[1].split(".")[:2]] >= [
        int(n) for n in asked.removeprefix("torch>=").split(".")
    ]
    assert "PIP_CONSTRAINT" in (ROOT / ".ci/run").read_text()


def build_wheel(folder: Path) -> Path:
    "A wheel of a clean copy of what git knows, made without the network"
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        if name.startswith("internlm_nb/") or "/" not in name:
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "src" / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder / "dist"),
        str(folder / "src"),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next((folder / "dist").glob("*.whl"))


@pytest.mark.slow
def test_a_wheel_trains_from_an_empty_folder(tmp_path):
    "It holds runs, corpus and commands; unpacked into a place of its own, it trains there without the clone, alone and as two ranks"
    pytest.importorskip("setuptools", minversion="77")
    wheel = build_wheel(tmp_path)
    place, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        z.extractall(place)
        points = z.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    for path in (ROOT / "internlm_nb").rglob("*"):
        if path.suffix in (".py", ".xz", ".md", ".txt") and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    assert not any(n.startswith(("tests/", "scripts/", "nbs/")) for n in names)
    for command, target in COMMANDS.items():
        assert re.search(rf"^{command} ?= ?{re.escape(target)}$", points, flags=re.M)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHONPATH": str(place),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    options = "demo --run-dir {} --train.steps 2 --train.valid-every 0 --data.micro-num 2 --model.num-layers 1".split()
    for ranks in ([], ["--nproc", "2"]):
        run_dir = f"out{len(ranks)}"
        line = [sys.executable, "-m", "internlm_nb.apps.pretrain", *ranks, *(o.format(run_dir) for o in options)]
        done = subprocess.run(line, cwd=empty, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((empty / run_dir / "config.json").read_text())["run"]["name"] == "demo"
    assert sorted(p.name for p in empty.iterdir()) == ["out0", "out2"]

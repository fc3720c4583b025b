"Many ranks in one run: torchrun and the script, any number of ranks saves and any loads, all stop at one step, and what fails is named with its rank"

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_parallel_alive import listeners
from train_runs import TINY, facts, tensors, tiny_run, trainer, write_folder

from internlm_nb.apps import pretrain
from internlm_nb.apps.runfile import load_run_file
from internlm_nb.checkpoint.durable import CheckpointError
from internlm_nb.checkpoint.find import newest
from internlm_nb.checkpoint.keep import steps
from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.checkpoint.writer import Writer
from internlm_nb.parallel.comm import CollectiveTimeout
from internlm_nb.parallel.consensus import RankFailed
from internlm_nb.parallel.layout import Layout
from internlm_nb.parallel.mesh import Mesh, Place, make_mesh
from internlm_nb.parallel.ranks import RankError
from internlm_nb.parallel.ranks import run_ranks as run_ranks_for
from internlm_nb.run import launch
from internlm_nb.run.callbacks import Callback
from internlm_nb.run.stopping import Stopped
from internlm_nb.train.config import ParallelConfig, RunConfig, ZeroConfig, changes, from_dict, to_dict
from internlm_nb.train.parallelize import build, layout_of
from internlm_nb.zero.copies import drifted
from internlm_nb.zero.hybrid import frozen_parts, trained_parts

ROOT = Path(__file__).parents[1]
run_ranks = partial(run_ranks_for, timeout=180)  # a busy machine may take its time
OWN = """
"A run of two ranks' worth of work"
from internlm_nb.data.loader import DataConfig
from internlm_nb.model.config import ModelConfig
from internlm_nb.train.config import CheckpointConfig, LogConfig, RunConfig, TrainConfig
from internlm_nb.train.optim import OptimConfig


def run():
    model = ModelConfig(family="internlm2", vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_ratio=2.0, multiple_of=16)
    return RunConfig("mine", model, DataConfig(seq_len=32, micro_bsz=2, micro_num=4), OptimConfig(lr=3e-4),
        TrainConfig(steps=4, precision="float32", device="cpu"), CheckpointConfig(every=2), LogConfig(sinks=(), progress=False, peak_tflops=1.0))


def prepare(run):
    print("prepared")
    return run


def finish(trainer):
    print("finished")
"""


def wide_run(**fields) -> RunConfig:
    "A tiny run that four ranks can share: float64, so that layouts agree to 1e-10"
    fields = {"data_micro_num": 4, "train_precision": "float64", "train_device": "cpu", "optim_lr": 1e-3, **fields}
    return tiny_run(replace(TINY, vocab_size=96), **fields)


def fit(
    mesh: Mesh | None,
    run: RunConfig,
    folder: Path,
    count: int | None = None,
    said: list[str] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Stopped:
    "What each rank does"
    import internlm_nb.run.callbacks as module

    module.save_plots = lambda run_dir: [run_dir / "plots" / "none"]
    return trainer(run, folder, said, mesh=mesh, callbacks=callbacks).fit(count)


def close(a: Path, b: Path, tolerance: float) -> None:
    "Two runs agree in loss and norm, and to the last integer in what is counted"
    x, y = facts(a), facts(b)
    assert [r["step"] for r in x] == [r["step"] for r in y]
    for r, s in zip(x, y):
        assert r.keys() == s.keys()
        for k, v in r.items():
            assert s[k] == v if isinstance(v, int) else abs(s[k] - v) <= tolerance * abs(v), (r["step"], k, v, s[k])


def torchrun(*args: str, cwd: Path, ranks: int = 2) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(ROOT / "scripts" / "train.py"),
        *args,
    ]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_torchrun_is_the_same_run(tmp_path, no_plots):
    "The script under torchrun, two ways tensor: what one process writes, within law 2; the run file's own functions are called once"
    (tmp_path / "mine.py").write_text(OWN)
    from internlm_nb.apps.pretrain import main

    main([str(tmp_path / "mine.py"), "--run-dir", str(tmp_path / "one")], runs=tmp_path)
    process = torchrun(
        str(tmp_path / "mine.py"), "--run-dir", "two", "--parallel.tensor", "2", "--parallel.mode", "msp", cwd=tmp_path
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert out.count("prepared") == 1 and out.count("all steps are made") == 1 and out.count("finished") == 1
    close(tmp_path / "one", tmp_path / "two", 1e-4)  # norms after some float32 steps; the loss is closer
    for r, s in zip(facts(tmp_path / "one"), facts(tmp_path / "two")):
        assert abs(r["loss"] - s["loss"]) <= 1e-5 * r["loss"]
    for rank in range(2):
        own = [
            json.loads(line) for line in (tmp_path / "two" / f"metrics-rank{rank:05d}.jsonl").read_text().splitlines()
        ]
        assert [r["step"] for r in own] == [0, 1, 2, 3] and all(
            r["rank"] == rank and r["step_s"] > 0 and r["wait_s"] >= 0 and r["memory_bytes"] > 0 for r in own
        )


@pytest.mark.parametrize(
    "options, words",
    [
        (
            "--data.micro-num 3",
            r"traceback : micro_num 3 is not a multiple of data 2: [^\n]* so write 4 \(fields: --data.micro-num 3\)",
        ),
        pytest.param(
            "--train.stepz 3",
            r"traceback : [^\n]*Unrecognized options.*Perhaps you meant.*--train.steps",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--train.precision bfloat16 --optim.frozen nothing.*",
            r"traceback : --optim.frozen: no parameter matches 'nothing\.\*'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_reason_of_a_wrong_option_is_heard(tmp_path, options, words):
    "Once, in torchrun's closing box, whichever rank ends first"
    (tmp_path / "mine.py").write_text(OWN)
    process = torchrun(str(tmp_path / "mine.py"), "--run-dir", "out", *options.split(), cwd=tmp_path)
    out, _ = process.communicate(timeout=120)
    found = re.findall(words, out, re.S)
    assert process.returncode and found and out.rindex("Root Cause") < out.rindex("traceback : "), out
    assert len(found) == 1 and out.count("rank 0: ") == 0, out


def nproc(*args: str, cwd: Path, ranks: int = 2) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "internlm_nb.apps.pretrain",
        "--nproc",
        str(ranks),
        str(cwd / "mine.py"),
        "--run-dir",
        "out",
        *args,
    ]
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ranks_of_one_machine(tmp_path):
    "--nproc starts them itself: a wrong option is said once and alone, Ctrl-C saves, the same command goes on, a killed rank is named"
    (tmp_path / "mine.py").write_text(OWN)
    process = nproc("--data.micro-num", "3", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out.strip() == ""
    assert re.fullmatch(r"internlm-train: micro_num 3 is not a multiple of data 2: [^\n]*\n", err), err
    assert not (tmp_path / "out").exists()
    process = nproc("--train.steps", "100000", cwd=tmp_path)
    wait_for_steps(tmp_path / "out" / "metrics.jsonl", 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "interrupted at step" in out, out + err
    made = len(facts(tmp_path / "out"))
    process = nproc("--train.steps", "100000", "--parallel.timeout", "30", cwd=tmp_path)
    wait_for_steps(tmp_path / "out" / "metrics.jsonl", made + 3, process)
    children = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and _environ(p).get("RANK") == "1" and str(tmp_path) in _cmdline(p)
    ]
    assert len(children) == 1
    assert listeners({process.pid, *children}) == {"127.0.0.1"}
    os.kill(children[0], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert err.endswith("internlm-train: rank 1 was ended by SIGKILL and left no message\n"), err


def wait_for_steps(metrics: Path, lines: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        assert process.poll() is None and time.monotonic() < until, "the run did not start"
        time.sleep(0.1)


@pytest.mark.slow  # the same of --nproc is in test_ranks_of_one_machine
def test_a_killed_rank_ends_the_job_and_is_named(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    process = torchrun(
        str(tmp_path / "mine.py"),
        "--run-dir",
        "out",
        "--train.steps",
        "100000",
        "--parallel.timeout",
        "30",
        cwd=tmp_path,
    )
    wait_for_steps(tmp_path / "out" / "metrics.jsonl", 3, process)
    children = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and _environ(p).get("RANK") == "1" and str(tmp_path) in _cmdline(p)
    ]
    assert len(children) == 1
    os.kill(children[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"train.py: rank 0: .* did not finish at step \d+.*rank 1 has not arrived", out, re.S), out
    assert re.search(r"rank\s*: 1", out)  # torchrun's own report


def _environ(process: Path) -> dict[str, str]:
    try:
        return dict(
            line.split("=", 1)
            for line in (process / "environ").read_bytes().decode(errors="replace").split("\0")
            if "=" in line
        )
    except OSError:
        return {}


def _cmdline(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace") + os.readlink(process / "cwd")
    except OSError:
        return ""


def test_any_number_of_ranks_goes_on(tmp_path, no_plots):
    "Two ranks, then one, then four that split the matrices: one run, one loss curve, the same weights"
    run = wide_run(train_steps=9, train_valid_every=3)
    assert fit(None, run, tmp_path / "one") is Stopped.DONE
    steps3 = replace(run, checkpoint=replace(run.checkpoint, every=3))
    run_ranks(fit, Layout(2), steps3, tmp_path / "mixed", 3)
    assert fit(None, steps3, tmp_path / "mixed", 3) is Stopped.PAUSED
    said = run_ranks(
        _fit_and_tell,
        Layout(4, tensor=2, mode="fsp"),
        replace(steps3, parallel=ParallelConfig(tensor=2, mode="fsp")),
        tmp_path / "mixed",
    )
    assert [s[0] for s in said] == ["all steps are made"] * 4
    assert any("--parallel.tensor: 1 -> 2" in line for line in said[0][1]) and said[1][1] == []
    close(tmp_path / "one", tmp_path / "mixed", 1e-10)
    a, b = tensors(tmp_path / "one", 9), tensors(tmp_path / "mixed", 9)
    assert a.keys() == b.keys()
    assert max((a[n].double() - b[n].double()).abs().max().item() for n in a) <= 1e-10
    files = sorted(p.name for p in (tmp_path / "mixed" / "checkpoints" / "9").glob("*.safetensors"))
    sizes = [(tmp_path / "mixed" / "checkpoints" / "9" / f).stat().st_size for f in files]
    assert len(files) == 4 and max(sizes) < 1.2 * min(sizes)  # each rank writes about as much


def test_any_layout_goes_on(tmp_path, no_plots):
    "A mixture of experts with a tied head: a pipeline that splits matrices, then one process, then ranks that split packs and experts, with validations between"
    model = replace(
        TINY, vocab_size=96, num_layers=4, tie_embeddings=True, num_experts=4, experts_per_token=2, capacity_factor=1.25
    )
    run = replace(wide_run(train_steps=6, train_valid_every=2), model=model)
    assert fit(None, run, tmp_path / "one") is Stopped.DONE
    steps2 = replace(run, checkpoint=replace(run.checkpoint, every=2))
    staged = ParallelConfig(tensor=2, mode="msp", pipeline=2, schedule="zbv", chunks=2)
    run_ranks(fit, Layout(4, tensor=2, pipeline=2, mode="msp"), replace(steps2, parallel=staged), tmp_path / "mixed", 2)
    assert fit(None, steps2, tmp_path / "mixed", 2) is Stopped.PAUSED
    said = run_ranks(
        _fit_and_tell,
        Layout(4, context=2, expert=2),
        replace(steps2, parallel=ParallelConfig(context=2, expert=2)),
        tmp_path / "mixed",
    )
    assert [s[0] for s in said] == ["all steps are made"] * 4
    a, b = (
        [{k: v for k, v in r.items() if not k.startswith("experts/")} for r in facts(tmp_path / name)]
        for name in ("one", "mixed")
    )
    assert len(a) == len(b) == 6
    for r, s in zip(a, b):
        assert r.keys() == s.keys()
        assert all(s[k] == v if isinstance(v, int) else abs(s[k] - v) <= 1e-10 * abs(v) for k, v in r.items())
    v, w = facts(tmp_path / "one", "validation.jsonl"), facts(tmp_path / "mixed", "validation.jsonl")
    assert [r["step"] for r in v] == [r["step"] for r in w] == [0, 2, 4, 6]
    assert all(
        abs(r["valid_loss"] - s["valid_loss"]) <= 1e-10 and r["valid_tokens"] == s["valid_tokens"] for r, s in zip(v, w)
    )
    x, y = tensors(tmp_path / "one", 6), tensors(tmp_path / "mixed", 6)
    assert x.keys() == y.keys()
    assert max((x[n].double() - y[n].double()).abs().max().item() for n in x) <= 1e-10


def _fit_and_tell(mesh, run, folder):
    said: list[str] = []
    return fit(mesh, run, folder, None, said).value, said


class _Ask(Callback):
    "Rank 1 is asked to stop while it makes step 3, by a callback, or by what its record says"

    def __init__(self, moment, rank):
        self.moment, self.rank = moment, rank

    def start(self, trainer):
        self.trainer = trainer

    def before_step(self, state):
        if (self.moment, self.rank, state.step) == ("before", 1, 3):
            self.trainer.stop()

    def after_step(self, record):
        if (self.moment, self.rank, record.step) == ("after", 1, 3):
            self.trainer.stop()

    def wants_stop(self, step):
        return Stopped.WISH if (self.moment, self.rank, step) == ("wish", 1, 4) else None


def _stopping(mesh, run, folder, moment):
    import internlm_nb.run.callbacks as module

    module.save_plots = lambda run_dir: [run_dir / "plots" / "none"]
    t = trainer(run, folder / moment, mesh=mesh, callbacks=[_Ask(moment, mesh.rank)])
    return t.fit(), t.state.step


def test_all_stop_at_the_same_step(tmp_path):
    "A wish travels with the figures of the step that is being made; one that a record gives, with those of the next"
    for moment, want in (
        ("before", (Stopped.INTERRUPTED, 4)),
        ("wish", (Stopped.WISH, 4)),
        ("after", (Stopped.INTERRUPTED, 5)),
    ):
        assert run_ranks(_stopping, Layout(2), wide_run(), tmp_path, moment) == [want] * 2
        assert [f.step for f in steps(tmp_path / moment / "checkpoints")] == [want[1]]


def _full_disk(mesh, run, folder):
    "Rank 1 cannot write its part of the second checkpoint"
    import internlm_nb.checkpoint.writer as writer

    if mesh.rank == 1:
        real = writer.write_shard

        def full(path, *args):
            if "/4." in str(path) or ".4" in str(path) or path.parent.name.startswith("4"):
                raise OSError(28, "No space left on device")
            return real(path, *args)

        writer.write_shard = full
    try:
        fit(mesh, run, folder)
    except (CheckpointError, RankFailed) as e:
        return type(e).__name__, str(e)


def test_a_save_that_fails_on_one_rank_leaves_nothing(tmp_path):
    run = wide_run(train_steps=4, checkpoint_every=2)
    got = run_ranks(_full_disk, Layout(2), run, tmp_path)
    assert got[1][0] == "CheckpointError" and "No space left" in got[1][1]
    assert got[0][0] == "RankFailed" and re.search(
        r"rank 1 failed while saving .*4: CheckpointError: .*No space left", got[0][1]
    )
    assert [f.step for f in steps(tmp_path / "checkpoints")] == [2]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if not p.name.startswith(".")) == ["2"]
    run_ranks(fit, Layout(2), run, tmp_path)  # and the run goes on from there
    assert [f.step for f in steps(tmp_path / "checkpoints")] == [2, 4]


def _unreadable(mesh, run, folder):
    "Rank 1's data breaks at step 3"
    import internlm_nb.run.callbacks as module

    module.save_plots = lambda run_dir: [run_dir / "plots" / "none"]
    t = trainer(run, folder, mesh=mesh)
    real = t.loader.batch

    def batch(step, *args):
        if mesh.rank == 1 and step == 3:
            raise OSError("the disk of node 1 is gone")
        return real(step, *args)

    t.loader.batch = batch  # type: ignore
    try:
        t.fit()
    except (OSError, RankFailed) as e:
        return f"{type(e).__name__}: {e}"


def test_data_that_one_rank_cannot_read_costs_no_step(tmp_path):
    got = run_ranks(_unreadable, Layout(2), wide_run(), tmp_path)
    assert got[0] == "RankFailed: rank 1 failed while reading the data of step 3: OSError: the disk of node 1 is gone"
    assert got[1] == "OSError: the disk of node 1 is gone"
    assert [f.step for f in steps(tmp_path / "checkpoints")] == [3]


class _Flip(Callback):
    "Turns one bit of one weight over, on one rank"

    def start(self, trainer):
        self.trainer = trainer

    def before_step(self, state):
        if state.step == 3 and self.trainer.mesh.rank == 1:
            shards = self.trainer.optimizer.engine.shards
            next(shard for shard in shards if "norm" in shard.name).master.view(torch.int64)[0] ^= 1


def _drifting(mesh, run, folder):
    try:
        fit(mesh, run, folder, callbacks=[_Flip()])
    except (CheckpointError, RankFailed) as e:
        return type(e).__name__, str(e)


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2)], ids=["data", "tensor"])
def test_copies_that_drift_are_not_saved(parallel, tmp_path):
    "One bit of one weight on one of two ranks: the save before stays the newest, and the parameter is named"
    run = replace(wide_run(train_steps=6, checkpoint_every=2), parallel=parallel)
    got = run_ranks(_drifting, layout_of(run, 2), run, tmp_path)
    assert [g[0] for g in got] == ["CheckpointError", "RankFailed"]
    assert re.match(r"nothing is saved: \S+norm\.weight differ between ranks", got[0][1]), got
    assert [f.step for f in steps(tmp_path / "checkpoints")] == [2]


def _turn(mesh, run, flips):
    "What is found when a bit of a parameter is turned over on a rank, and back"
    engine, found = build(run, mesh).engine, []
    parts = [*trained_parts(engine, [shard.master for shard in engine.shards]), *frozen_parts(engine)]
    held = {part.name: part.tensor for part in parts}
    for rank, name, lenient in flips:
        if mesh.rank == rank:
            held[name].view(torch.int64)[0] ^= 1
        found.append(drifted(engine, same_kernels=not lenient))
        if mesh.rank == rank:
            held[name].view(torch.int64)[0] ^= 1
    return [*found, drifted(engine)]


def test_copies_are_found_wherever_they_are():
    "Over tensor, over stages of a pipeline that share an embedding, over data with sharded weights; frozen ones too"
    model = replace(TINY, vocab_size=96, tie_embeddings=True)
    tied = replace(wide_run(optim_frozen=("head.norm.weight",)), model=model)
    staged = replace(tied, parallel=ParallelConfig(tensor=2, pipeline=2))
    norm, tie, frozen = "blocks.1.ffn_norm.weight", "embedding.weight", "head.norm.weight"
    layout, last = layout_of(staged, 4), 3  # of the last stage and the second tensor rank, whatever the order of axes
    flips = [(last, norm, False), (last, tie, False), (last, frozen, False), (last, norm, True)]
    assert run_ranks(_turn, layout, staged, flips) == [[[norm], [tie], [frozen], [], []]] * 4
    sharded = replace(tied, zero=ZeroConfig(param=2, grad=2, optim=2))
    flips = [(3, tie, True), (0, frozen, False)]
    assert run_ranks(_turn, Layout(4), sharded, flips) == [[[tie], [frozen], []]] * 4


def test_nothing_is_saved_when_a_rank_is_gone(tmp_path, no_plots, monkeypatch):
    "A save is the work of all ranks: without one of them it would only hide why"
    t = trainer(tiny_run(train_steps=4), tmp_path)
    t.fit(2)
    saves = []

    def lost(*args, **kwargs):
        raise CollectiveTimeout("rank 1 has not arrived")

    t.saver.save = lambda *args: saves.append(1)  # type: ignore
    t.troubles.keep("data", OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        t.raise_trouble("data")
    assert saves == [1]
    monkeypatch.setattr("internlm_nb.run.trainer.raise_together", lost)
    with pytest.raises(CollectiveTimeout, match="rank 1 has not arrived"):
        t.raise_trouble("data")
    assert saves == [1]


def test_a_validation_in_groups_is_the_same(tmp_path, no_plots, monkeypatch):
    import internlm_nb.train.step as step

    t = trainer(wide_run(train_valid_every=4), tmp_path)
    packs = [p for i in range(3) for p in t.loader.batch(i, 0, 1)]
    figures, sizes, real = [], [], step.forward_only
    monkeypatch.setattr(
        step, "forward_only", lambda model, batches, note: (sizes.append(len(batches)), real(model, batches, note))
    )
    for group in (100, 5):
        monkeypatch.setattr(step, "_GROUP", group)
        figures.append(step.evaluate(t.model, packs, t.loader.types))
    assert sizes == [12, 5, 5, 2] and figures[0]["tokens"] > 0
    assert figures[0].keys() == figures[1].keys() and all(
        abs(figures[0][k] - figures[1][k]) <= 1e-12 * abs(figures[0][k]) for k in figures[0]
    )


def test_micro_batches_are_counted_as_the_user_writes_them():
    run = wide_run()
    run = replace(
        run, model=replace(run.model, num_layers=4), parallel=ParallelConfig(pipeline=2, schedule="zbv", chunks=2)
    )
    with pytest.raises(
        ValueError,
        match=r"--data.micro-num 4 gives each of 2 data ranks 2 packs: micro_num 2 is fewer.*Write --data.micro-num 8 or more, or --parallel.schedule zbh1 --parallel.chunks 1",
    ):
        layout_of(run, 4)
    layout_of(replace(run, data=replace(run.data, micro_num=8)), 4)
    layout_of(replace(run, parallel=ParallelConfig(pipeline=2, schedule="zbh1")), 4)
    three = replace(
        run, data=replace(run.data, micro_num=6), parallel=ParallelConfig(pipeline=2, schedule="interleaved", chunks=2)
    )
    with pytest.raises(
        ValueError,
        match=r"--data.micro-num 6 gives each of 2 data ranks 3 packs.*Write --data.micro-num 8, or --parallel.schedule 1f1b --parallel.chunks 1",
    ):
        layout_of(three, 4)


def test_what_does_not_fit_is_refused(tmp_path):
    run = wide_run()
    with pytest.raises(ValueError, match=r"--parallel.tensor is 0"):
        ParallelConfig(tensor=0)
    with pytest.raises(ValueError, match=r"--parallel.mode is 'isp': choose one of mtp, msp, fsp"):
        ParallelConfig(mode="isp")  # type: ignore[arg-type]
    with pytest.raises(RankError, match=r"data.micro_num: a batch of 4 packs cannot be shared evenly by 3 data ranks"):
        run_ranks(fit, Layout(3), run, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_older_runs_have_one_rank(tmp_path):
    "A saved run without the field still loads, and a layout may change in the middle of a run"
    saved = to_dict(wide_run())
    del saved["parallel"]
    old = from_dict(RunConfig, saved)
    assert old.parallel == ParallelConfig()
    found = changes(old, replace(old, parallel=ParallelConfig(tensor=2, mode="msp")))
    assert [c.name for c in found] == ["parallel.tensor", "parallel.mode"] and not any(c.breaks for c in found)


# what ranks agree on before the first step


def _elsewhere(mesh, root):
    "Rank 1 has another folder under the run's name"
    launch.SEEN_S = 0.3
    os.chdir(Path(root) / ("a" if mesh.rank != 1 else "b"))
    launch.check_disk(Path("run"), mesh)


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_is_another_one_for_a_rank_is_named(made, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        if made:
            (tmp_path / name / "run").mkdir()
    what = "has another folder under this name" if made else "has no such folder"
    with pytest.raises(
        RankError,
        match=rf"rank 1 failed while looking for the folder of rank 0: OSError: \S+ {what}: .*give an absolute --run-dir",
    ):
        run_ranks(_elsewhere, Layout(3), tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def _one_folder(mesh, folder):
    launch.check_disk(folder, mesh)
    return sorted(p.name for p in folder.iterdir())


def test_one_and_the_same_folder_is_left_as_it_was(tmp_path):
    (tmp_path / "other").symlink_to(tmp_path)
    folders = [tmp_path, tmp_path / "other"]  # under two names
    got = run_ranks(lambda mesh: _one_folder(mesh, folders[mesh.rank]), Layout(2), check=False)
    assert got == [["other"], ["other"]]


def _other_facts(mesh, run):
    launch.agree_on(
        run, mesh, {"what data/tok holds": "400 documents" if mesh.rank != 2 else "300 documents", "same": "x"}
    )


def test_what_data_folders_hold_is_compared():
    with pytest.raises(RankError, match="rank 2: what data/tok holds is 300 documents, on rank 0 400 documents"):
        run_ranks(_other_facts, Layout(3), wide_run())


def _what(fn, *args, **options):
    "What a rank is told"
    begin = time.monotonic()
    try:
        fn(*args, **options)
    except (ValueError, RankFailed, pretrain.UsageError) as e:
        return str(e), time.monotonic() - begin
    raise AssertionError("nothing was said")


def _unlike(mesh, root, run):
    "Each rank has a folder of its own under the same name: other held-out text, other text, another run file"
    os.chdir(Path(root) / str(mesh.rank))
    validates = replace(run, train=replace(run.train, valid_every=2), data=replace(run.data, valid_folder="held"))
    pretrain.open_mesh = lambda *args, **options: mesh
    module = load_run_file("mine.py", Path(root))
    place = Place(mesh.rank, 2, mesh.rank)
    return [
        _what(trainer, validates, Path(root) / "out", mesh=mesh),
        _what(trainer, replace(run, data=replace(run.data, train_folder=("tok",))), Path(root) / "out", mesh=mesh),
        _what(trainer, replace(run, optim=replace(run.optim, lr=1e-3 + mesh.rank)), Path(root) / "out", mesh=mesh),
        _what(pretrain.make_trainer, module, run, str(Path(root) / "out"), "", place),
    ]


def test_ranks_that_differ_are_named_at_once(tmp_path):
    "In held-out data, in training data of equal counts, in a field, in the run file's code: before anything is made"
    for rank in range(2):
        write_folder(tmp_path / str(rank) / "held", kinds=("en",), count=20 - rank, top=96)
        write_folder(tmp_path / str(rank) / "tok", kinds=("en",), top=96)
        (tmp_path / str(rank) / "mine.py").write_text(OWN + f"# {rank}\n")
    path = tmp_path / "1" / "tok" / "en" / "a.bin"
    path.write_bytes(path.read_bytes().translate(bytes.maketrans(b"12", b"21")))
    told = run_ranks(_unlike, Layout(2), tmp_path, wide_run())
    words = (
        r"rank 1: held holds other data: 19 documents",
        r"rank 1: tok holds other data: 60 documents.*first difference: en/a.bin has other content",
        r"rank 1: --optim.lr is 1.001, on rank 0 0.001",
        r"rank 1: the run file's code is \w+, on rank 0 \w+",
    )
    for rank in range(2):
        for (text, seconds), word in zip(told[rank], words, strict=True):
            assert re.search(word, text) and seconds < 60, text  # the timeout would be 180 s
    assert not (tmp_path / "out" / "config.json").exists()


class _Slow(Callback):
    "Rank 1 writes slowly, and rank 0 deletes slowly"

    def __init__(self, rank, seconds):
        self.rank, self.seconds = rank, seconds

    def start(self, trainer):
        import internlm_nb.checkpoint.writer as writer
        import internlm_nb.run.saver as saver

        module, name = (saver, "prune") if self.rank == 0 else (writer, "write_shard")
        real = getattr(module, name)
        setattr(module, name, lambda *args, **options: (time.sleep(self.seconds), real(*args, **options))[1])


def _patient(mesh, root, run, limit, seconds):
    "Preparing, saving, deleting, and comparing checksums at a resume, each longer than a collective may take"
    mesh = make_mesh(mesh.layout, timeout=limit)
    module = ModuleType("mine")
    module.prepare = lambda run: (time.sleep(seconds if mesh.rank == 0 else 0), run)[1]  # type: ignore[attr-defined]
    run = pretrain.prepare(module, run, mesh)
    fit(mesh, run, Path(root), 2, callbacks=[_Slow(mesh.rank, seconds)])
    real = Checkpoint.verify

    def slow(self, *args):
        time.sleep(seconds if mesh.rank == 1 else 0)
        return real(self, *args)

    Checkpoint.verify = slow  # type: ignore[method-assign]
    return trainer(run, Path(root), mesh=mesh).state.step


def test_slow_work_on_files_is_waited_for(tmp_path):
    got = run_ranks(_patient, Layout(2), tmp_path, wide_run(checkpoint_every=2), 2.0, 2.4)
    assert got == [2, 2]


def _resuming(mesh, root, seen):
    said, shares = [], []
    real = Checkpoint.verify

    def verify(self, rank, ranks, progress=False):
        shares.append((self.folder.name, rank, ranks))
        return real(self, rank, ranks, progress)

    Checkpoint.verify = verify  # type: ignore[method-assign]
    try:
        found = launch.choose_together(
            lambda damaged: newest(root, say=said.append, damaged=damaged), mesh.axis("world")
        )
    except (CheckpointError, RankFailed) as e:
        return type(e).__name__, str(e), shares
    return (found and found.name), said, shares


def test_checksums_are_shared_and_damage_that_one_rank_sees_counts_for_all(tmp_path):
    run = lambda: run_ranks(_resuming, Layout(3), tmp_path, None)  # noqa: E731
    assert [r[0] for r in run()] == [None] * 3
    for step in (10, 20):
        with Writer(tmp_path / str(step), shard_bytes=64) as writer:
            for n in range(5):
                writer.add(f"w{n}", torch.full((16,), float(step)))
            writer.write()
            writer.commit({"step": step})
    for rank, (name, said, shares) in enumerate(run()):
        assert name == "20" and said == [] and shares == [("20", rank, 3)]  # every file by one rank
    shard = tmp_path / "20" / "rank-00000-00004.safetensors"  # rank 1's
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    got = run()
    assert [r[0] for r in got] == ["10"] * 3 and "rank-00000-00004" in got[0][1][0] and got[1][1] == []
    assert got[2][2] == [("20", 2, 3), ("10", 2, 3)]
    shard = tmp_path / "10" / "rank-00000-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    got = run()
    assert got[0][0] == "CheckpointError" and "none can be used" in got[0][1]
    assert got[1][0] == "RankFailed" and "rank 0 failed while looking for a checkpoint: CheckpointError" in got[1][1]

"What a user meets of the lab on the command line: `plan.py trace`, `train.py --dry-run`, and every refusal with its name"

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_nb.apps import plan, pretrain

ROOT = Path(__file__).parent.parent
SMALL = (
    "--model.vocab-size 64 --model.hidden-size 32 --model.num-layers 2 --model.num-heads 2 --model.num-kv-heads 2"
    " --data.seq-len 32 --data.micro-num 8"
).split()


def said(capsys, *args: str) -> tuple[int, str, str]:
    code = plan.main(list(args))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_trace_is_written_for_perfetto_and_as_pictures(tmp_path, capsys):
    for name, more in (("rank.json", ()), ("memory.png", ()), ("time.svg", ("--picture", "timeline"))):
        line = f"trace demo --cluster a100-roce-4x100 --gpus 8 --rank 5 --zero.optim 4 --out {tmp_path / name}".split()
        code, out, err = said(capsys, *line, *SMALL, *more)
        assert code == 0 and not err, err
        assert "rank 5 of 8" in out and "memory at its peak" in out and "updated parameters" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.png", "rank.json", "time.svg"]
    saved = json.loads((tmp_path / "rank.json").read_text())
    assert saved["distributedInfo"] == {"backend": "nccl", "rank": 5, "world_size": 8}
    lanes = {e["args"]["name"] for e in saved["traceEvents"] if e["name"] == "thread_name"}
    assert {"compute", "optim", "copies"} <= lanes
    for e in saved["traceEvents"]:
        assert e["ph"] in "MXsfC" and (e["ph"] == "M" or e["ts"] >= 0)
    starts = {e["id"] for e in saved["traceEvents"] if e["ph"] == "s"}
    assert starts and starts == {e["id"] for e in saved["traceEvents"] if e["ph"] == "f"}
    memory = [e["args"]["bytes"] for e in saved["traceEvents"] if e["ph"] == "C"]
    assert max(memory) > min(memory) > 0


@pytest.mark.parametrize(
    "line, words",
    [
        ("trace demo --gpus 4 --rank 4", "ranks are 0 to 3"),
        ("trace demo --gpus 4 --rank -1", "ranks are 0 to 3"),
        ("trace demo --gpus 0", "--gpus is 0"),
        ("trace demo --cluster h100-ib-8x40", "did you mean h100-ib-8x400?"),
        ("trace demo --gpus 3 --data.micro-num 4", "not a multiple of data 3"),
        ("trace demo --gpus 4 --parallel.tensor 3", "tensor 3"),
        ("trace demo --lengths 10,x", "--lengths 10,x"),
        ("trace demo --lengths 1000000", "1000000 tokens"),
        ("trace demo --out nowhere/rank.json", "there is no folder"),
        ("trace demo --out rank.txt", "end it in one of"),
        ("trace demo --train.precision bfloat16 --train.fp8 rowwise", "cannot be traced yet"),
        ("trace demoo", "Did you mean demo?"),
        ("plot demo", "there is no command 'plot'"),
    ],
)
def test_what_cannot_be_is_named_at_once(line, words, capsys):
    code, out, err = said(capsys, *line.split())
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert not out


def test_help(capsys):
    assert said(capsys)[0] == 2 and said(capsys, "--help")[:1] == (0,)
    with pytest.raises(SystemExit) as end:
        plan.main(["trace", "--help"])
    assert end.value.code == 0 and "a100-roce-4x100" in capsys.readouterr().out


def test_a_dry_run_says_what_is_needed(capsys):
    line = "demo --dry-run --gpus 4 --cluster a100-80 --parallel.pipeline 2 --train.device cuda".split()  # not here
    assert pretrain.main([*line, *SMALL]) is None
    out = capsys.readouterr().out
    assert "data 2, pipeline 2" in out and "rank 0" in out and "rank 2" in out and "fits:" in out
    assert pretrain.main(["demo", "--dry-run", *SMALL]) is None  # on this machine
    assert "this machine's CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, words",
    [
        ("internlm-7b --dry-run", "say where it is to run"),
        ("internlm-7b --dry-run --cluster a100-80 --gpus 8 --model.num-layers 4 --data.micro-bsz 64", "it needs"),
        ("internlm-7b --dry-run --cluster a100-40 --gpus 8 --model.num-layers 2 --data.micro-bsz 256", "neither"),
        ("demo --dry-run --cluster nosuch", "no cluster or device"),
        ("demo --dry-run --gpus 0", "--gpus is 0"),
        ("demo --dry-run --nproc 2", "write --gpus N"),
        ("demo --gpus 2", "are for --dry-run"),
        ("demo --dry-run --gpus 4 --parallel.tensor 3", "tensor 3"),
    ],
)
def test_a_dry_run_refuses_what_cannot_be(line, words, capsys):
    with pytest.raises(SystemExit) as end:
        pretrain.main(line.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and words in err and "Traceback" not in err, err


def test_the_script_is_the_command():
    line = [sys.executable, ROOT / "scripts" / "plan.py", "trace", "demo", "--gpus", "2", "--rank", "1", *SMALL]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "rank 1 of 2" in done.stdout, done.stderr

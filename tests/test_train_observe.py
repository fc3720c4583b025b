"What a run says about itself: schedules, metrics, sinks, plots, live monitor and profiler"

import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.observe import sinks as sinks_module
from internlm_nb.observe.metrics import (
    LOG_KEYS,
    StepRecord,
    Throughput,
    TypeMeter,
    datasheet_tflops,
    flop_rates,
    log_line,
    peak_tflops,
)
from internlm_nb.observe.monitor import LivePlot, progress_bar, thin
from internlm_nb.observe.plots import compare_runs, plot_run, save_plots, series, smooth
from internlm_nb.observe.profile import StepProfiler, parse_steps
from internlm_nb.observe.sinks import ConsoleSink, JsonlSink, Sink, Sinks, open_sinks, read_metrics, to_json
from internlm_nb.train.schedules import ScheduleConfig, acts, beta2_at, lr_at

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)


# schedules

CONFIGS = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["cosine", "constant", "linear", "wsd"]),
    warmup_ratio=st.floats(0, 0.5),
    init_steps=st.integers(0, 5),
    min_lr=st.sampled_from([0.0, 1e-5, 1e-4]),
    decay_ratio=st.floats(0, 0.4),
    decay_shape=st.sampled_from(["linear", "sqrt"]),
)


@PROPERTY
@given(CONFIGS, st.integers(60, 400))
def test_schedule_has_three_acts(cfg, total):
    "Zero, then up in equal steps to the full rate, then never up again, never under min_lr, and at min_lr in the end"
    act, rates = acts(total, cfg), [lr_at(e, 1e-3, total, cfg) for e in range(total + 3)]
    assert rates[: cfg.init_steps] == [0.0] * cfg.init_steps
    warm = rates[act.warmup_start : act.warmup_end]
    assert np.allclose(np.diff(warm), 1e-3 / max(len(warm), 1), rtol=1e-9)
    assert not warm or warm[-1] == 1e-3
    main = rates[act.warmup_end :]
    assert max(lr_at(e, 1e-6, total, cfg) for e in range(total)) <= 1e-6  # never raised to min_lr
    assert all(a >= b for a, b in itertools.pairwise(main))
    if cfg.kind == "constant":
        assert set(main) == {1e-3}
    else:
        assert all(r >= cfg.min_lr for r in main) and main[-1] == main[-3] == pytest.approx(cfg.min_lr, abs=1e-19)
    if cfg.kind == "wsd":
        assert set(rates[act.warmup_end : act.decay_start]) <= {1e-3}


@PROPERTY
@given(st.integers(2, 300), st.integers(0, 7), st.floats(0, 0.6), st.floats(1e-6, 1e-2), st.floats(0, 1))
def test_cosine_is_the_formula(total, init, ratio, lr, share):
    total, eta = total + init + 1, lr * share
    cfg, warm = ScheduleConfig(warmup_ratio=ratio * 0.9, init_steps=init, min_lr=eta), None
    warm = int(total * cfg.warmup_ratio)
    if init + warm >= total:
        return
    for e in range(init + warm, total):
        want = eta + (lr - eta) * (1 + math.cos(math.pi * (e - init - warm) / (total - init - warm))) / 2
        assert lr_at(e, lr, total, cfg) == pytest.approx(want, rel=1e-13, abs=1e-20)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("warm", [0.0, 0.01, 0.1, 0.33])
def test_schedule_equals_torch(kind, warm):
    "PyTorch's chained schedulers walk the same path; theirs multiply step on step, hence 1e-10 relative"
    total, lr, eta = 300, 3e-4, 3e-5
    n = int(total * warm)
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    if kind == "cosine":
        down = torch.optim.lr_scheduler.CosineAnnealingLR(opt, total - n, eta_min=eta)
    else:
        down = torch.optim.lr_scheduler.LinearLR(opt, 1.0, eta / lr, total - n)
    chain = down
    if n:
        up = torch.optim.lr_scheduler.LambdaLR(opt, lambda e: (e + 1) / n)
        chain = torch.optim.lr_scheduler.SequentialLR(opt, [up, down], [n])
    cfg = ScheduleConfig(kind=kind, warmup_ratio=warm, min_lr=eta)
    for e in range(total):
        assert opt.param_groups[0]["lr"] == pytest.approx(lr_at(e, lr, total, cfg), rel=1e-10), e
        opt.step()
        chain.step()


def test_check_values():
    cfg = ScheduleConfig(warmup_ratio=0.01, min_lr=1e-5)
    assert [lr_at(k, 1e-4, 50_000, cfg) for k in range(6)] == pytest.approx(
        [2e-7 * (k + 1) for k in range(6)], rel=1e-13
    )
    assert [beta2_at(t, 0.95, 0.8) for t in (1, 100)] == [0.95, 1 - 100**-0.8]
    assert beta2_at(10**6, 0.95, 0) == 0.95


@pytest.mark.parametrize(
    "bad",
    [
        dict(warmup_ratio=-0.1),
        dict(warmup_ratio=1.1),
        dict(decay_ratio=2),
        dict(init_steps=-1),
        dict(min_lr=-1e-5),
        dict(min_lr=math.nan),
        dict(kind="step"),
        dict(decay_shape="cosine"),
    ],
)
def test_bad_schedules_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad)).replace("_", "-")):
        ScheduleConfig(**bad)


# metrics


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(1e-3, 100)), min_size=1, max_size=130), st.integers(1, 8))
def test_windows_equal_numpy(steps, ranks):
    speed = Throughput(ranks)
    for n, (tokens, seconds) in enumerate(steps, 1):
        speed = speed.add(tokens, seconds)
        table = np.array(steps[:n])
        for name, window in (("tgs", 1), ("tgs_10", 10), ("tgs_50", 50), ("tgs_mean", n)):
            t, s = table[-window:].sum(0)
            assert speed.figures()[name] == pytest.approx(t / ranks / s, rel=1e-12)
    assert len(speed.recent) <= 50


def test_throughput_before_the_first_step_and_without_time():
    assert set(Throughput().figures().values()) == {0.0}
    for seconds in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clock"):
            Throughput().add(1, seconds)
        with pytest.raises(ValueError, match="clock"):
            flop_rates(seconds, 1, None, 1, 1, 1, 1)


@pytest.mark.parametrize("tgs, gflop, tflops", [(1030.92, 123.965, 127.80), (4078, 44.411387904, 181.11)])
def test_published_rates(tgs, gflop, tflops):
    rates = flop_rates(2.0, 8, 312.0, *[tgs * 2 * 8 * gflop * 1e9] * 4)
    assert rates["tflops"] == pytest.approx(tflops, abs=0.005)
    assert rates["mfu"] == rates["mfu_causal"] == rates["hfu"] == pytest.approx(tflops / 312, abs=1e-4)


def test_peaks():
    assert datasheet_tflops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312
    assert datasheet_tflops("NVIDIA H100 80GB HBM3", "float16") == datasheet_tflops("NVIDIA H200", "bfloat16") == 989
    assert datasheet_tflops("NVIDIA H100 NVL", "bfloat16") == 835 and datasheet_tflops("Tesla T4", "bfloat16") is None
    assert (peak_tflops(torch.device("cpu"), "bfloat16") or 0) > 0 and (
        peak_tflops(torch.device("cpu"), "tf32") or 0
    ) > 0
    assert peak_tflops(torch.device("meta"), "float32") is None


@PROPERTY
@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 60),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_type_sums_equal_a_naive_loop(seed, types, batches, tokens, dtype):
    g = torch.Generator().manual_seed(seed)
    names = [f"type{i}" for i in range(types)]
    meter, seen = TypeMeter(names), []
    for _ in range(batches):
        loss = (torch.rand(tokens, generator=g) * 10).to(dtype)
        labels = torch.randint(-1, 3, (tokens,), generator=g)
        labels[labels == -1] = -100
        loss[labels == -100] = math.nan  # what is ignored may be anything
        right, kinds = torch.rand(tokens, generator=g) > 0.5, torch.randint(0, types, (tokens,), generator=g)
        kinds[labels == -100] = -1  # padding may have no type
        meter.add(loss, right, kinds, labels)
        seen += [(names[int(k)], float(l), bool(r)) for l, r, k, y in zip(loss, right, kinds, labels) if y != -100]

    got = meter.read()
    for name in [*names, ""]:
        rows = [(l, r) for n, l, r in seen if name in ("", n)]
        key = f"/{name}" if name else ""
        if not rows:
            assert f"loss{key}" not in got and f"tokens{key}" not in got
            continue
        mean = math.fsum(l for l, _ in rows) / len(rows)
        assert got[f"loss{key}"] == pytest.approx(mean, rel=1e-13)  # sums of at most 240 terms in float64
        assert got[f"perplexity{key}"] == pytest.approx(math.exp(mean), rel=1e-12)
        assert got[f"accuracy{key}"] == pytest.approx(sum(r for _, r in rows) / len(rows), rel=1e-15)
        assert got[f"tokens{key}"] == len(rows) and type(got[f"tokens{key}"]) is int


def test_meter_never_waits_for_the_device():
    "Adding runs under fake tensors, where any look at a value raises"
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        meter = TypeMeter(["a", "b"])
        for _ in range(2):
            meter.add(
                torch.rand(8),
                torch.zeros(8, dtype=torch.bool),
                torch.zeros(8, dtype=torch.long),
                torch.zeros(8, dtype=torch.long),
            )


def test_meter_takes_a_loss_with_a_gradient():
    meter, loss = TypeMeter(["a"]), torch.rand(4, requires_grad=True)
    meter.add(
        loss, torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.long)
    )
    assert not meter.sums.requires_grad and meter.read()["accuracy"] == 1


RECORD = StepRecord(
    step=12,
    loss=2.5,
    grad_norm=0.75,
    lr=2e-7,
    tokens=4096,
    tgs=1234.5,
    tflops=0.125,
    num_consumed_tokens=10**12,
    extra={"mfu": 0.5},
)


def test_log_line_is_the_contract():
    line = log_line(RECORD)
    names = "tflops step loss tgs@(tokens/gpu/second) lr loss_scale grad_norm micro_num num_consumed_tokens inf_nan_skip_batches num_samples_in_batch largest_length largest_batch smallest_batch adam_beta2 fwd_bwd_time"
    assert LOG_KEYS == tuple(n.replace("@", " ") for n in names.split())
    found = re.findall(r"(?:^| )(tgs \(tokens/gpu/second\)|\S+?)=(\S+)", line)
    assert tuple(k for k, _ in found) == (*LOG_KEYS, "tokens", "mfu")
    values = dict(found)
    assert values["step"] == "12" and values["num_consumed_tokens"] == "1000000000000" and float(values["lr"]) == 2e-7
    assert log_line(RECORD.as_dict()) == line and "mfu" not in log_line(RECORD, skip=["mfu"])
    assert "grad_norm=nan" in log_line({**RECORD.as_dict(), "grad_norm": math.nan})


# sinks


@PROPERTY
@given(st.integers(0, 12), st.integers(0, 14), st.integers(0, 40), st.booleans(), st.integers(0, 12))
def test_each_step_stands_once(tmp_path_factory, done, resume, cut, garbage, more):
    "Any number of records, the file cut at any byte, resumed at any step: a whole record for each step, in order, nothing lost"
    run = tmp_path_factory.mktemp("run")
    sink = JsonlSink(run)
    for k in range(done):
        sink.write({"step": k, "loss": k / 7, "part": 1})
    raw = sink.path.read_bytes() if done else b""
    raw = raw[: max(len(raw) - cut, 0)] + (b"\x00\xff\x00" if garbage else b"")
    sink.path.write_bytes(raw)
    whole = [json.loads(x) for x in raw.split(b"\n") if x.endswith(b"}")]

    again = JsonlSink(run, start_step=resume)
    for k in range(resume, resume + more):
        again.write({"step": k, "loss": k / 7, "part": 2})

    records = read_metrics(run)
    assert records == [r for r in whole if r["step"] < resume] + [
        {"step": k, "loss": k / 7, "part": 2} for k in range(resume, resume + more)
    ]
    aside = run / "metrics.dropped.jsonl"
    lines = [x for x in raw.split(b"\n") if x]
    kept = sink.path.read_bytes().split(b"\n") + (aside.read_bytes().split(b"\n") if aside.exists() else [])
    assert all(line in kept for line in lines)
    assert not [p for p in run.iterdir() if p.name not in ("metrics.jsonl", "metrics.dropped.jsonl")]


def test_torn_line_is_said(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": 1, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [0]
    JsonlSink(tmp_path, start_step=1)
    assert "line 2 was cut off" in caplog.text and (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 0}\n'


def test_a_last_line_without_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": 1}')
    JsonlSink(tmp_path, start_step=2).write({"step": 2})
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize(
    "line", [b"oops", b"[1]", b"12", b'{"loss": 1}', b'{"step": "3"}', b'{"step": true}', b"\xff\xfe"]
)
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no record"):
        read_metrics(tmp_path)
    JsonlSink(tmp_path, start_step=3)  # resuming sets it aside
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 2]
    assert (tmp_path / "metrics.dropped.jsonl").read_bytes() == line + b"\n"


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    sink = JsonlSink(tmp_path)
    sink.write({"step": 0})
    real = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if len(data) < 10:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:5])

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full(real(self, *a, **k)))
    with pytest.raises(OSError, match="No space"):
        sink.write({"step": 1, "loss": 1.0})
    monkeypatch.undo()
    assert sink.path.read_bytes() == b'{"step": 0}\n'
    sink.write({"step": 1})
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1]


def test_a_killed_writer_loses_no_finished_record(tmp_path):
    code = f"""
from internlm_nb.observe.sinks import JsonlSink
s, k = JsonlSink({str(tmp_path)!r}), 0
while True:
    s.write({{"step": k, "pad": "x" * 200}})
    print(k, flush=True)
    k += 1
"""
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert p.stdout
    told = 0
    for line in p.stdout:
        told = int(line)
        if told >= 50:
            break
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    steps = [r["step"] for r in read_metrics(tmp_path)]
    assert steps == list(range(len(steps))) and len(steps) > told


def test_a_reader_beside_a_resume_sees_old_or_new(tmp_path):
    "While the file is being shortened again and again, a reader never sees anything but whole states"
    path, stop, seen = tmp_path / "metrics.jsonl", threading.Event(), []
    old, new = b"".join(b'{"step": %d}\n' % k for k in range(50)), 20
    path.write_bytes(old)

    def look():
        while not stop.is_set():
            seen.append(len(read_metrics(tmp_path)))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(30):
        JsonlSink(tmp_path, start_step=new)
        beside = tmp_path / "whole"
        beside.write_bytes(old)
        os.replace(beside, path)
    stop.set()
    reader.join()
    assert set(seen) <= {20, 50} and seen


@PROPERTY
@given(
    st.dictionaries(
        st.text(max_size=5), st.one_of(st.floats(), st.integers(), st.text(max_size=9), st.none()), max_size=6
    )
)
def test_json_is_strict(record):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    back = json.loads(to_json(record), parse_constant=refuse)
    assert back == {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    assert "\n" not in to_json(record)


def test_tensorboard_file_is_readable(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    group = open_sinks(["tensorboard", "jsonl"], tmp_path)
    for k in range(6):
        group.write({"step": k, "loss": 3 - k / 4, "grad_norm": None, "loss/en": 1.5})
    group.text("config", "lr = 1")
    group.figure("overview", plot_run(tmp_path), step=5)
    group.close()
    resumed = open_sinks(["tensorboard", "jsonl"], tmp_path, start_step=4)
    for k in range(4, 8):
        resumed.write({"step": k, "loss": 2.0})
    resumed.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(k, 3 - k / 4) for k in range(4)] + [
        (k, 2.0) for k in range(4, 8)
    ]
    assert sorted(events.Tags()["scalars"]) == ["loss", "loss/en"] and events.Tags()["images"] == ["overview"]
    assert b"lr = 1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_a_closed_run_goes_on(tmp_path):
    "An interrupted run closes its sinks, and goes on in the next cell with the same ones"
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    JsonlSink(tmp_path).write({"step": 0, "loss": 1.0})
    group = open_sinks(["tensorboard", "jsonl"], tmp_path, start_step=1)
    for k in range(1, 4):
        group.write({"step": k, "loss": 1.0})
    group.close()
    for k in range(4, 6):
        group.write({"step": k, "loss": 1.0})
    group.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(6))


def test_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'internlm_nb\[tensorboard\]'"):
        open_sinks(["tensorboard"], tmp_path)
    with pytest.raises(ValueError, match="'wandb': choose from console, jsonl, tensorboard"):
        open_sinks(["jsonl", "wandb"], tmp_path)


def test_every_sink_is_served_though_one_fails():
    class Bad(Sink):
        def write(self, record):
            raise RuntimeError("gone")

        def close(self):
            raise RuntimeError("gone too")

    class Good(Sink):
        def __init__(self):
            self.got = []

        def write(self, record):
            self.got.append(record)

        def close(self):
            self.got.append("closed")

    good = Good()
    group = Sinks([Bad(), good])
    with pytest.raises(RuntimeError, match="gone") as e:
        group.write({"step": 1})
    assert any("Bad" in note for note in e.value.__notes__)
    with pytest.raises(RuntimeError, match="gone too"):
        group.close()
    assert good.got == [{"step": 1}, "closed"]


def test_console_keeps_its_rhythm(capsys):
    lines: list[str] = []
    for k in range(20):
        ConsoleSink(every=8, write=lines.append).write({"step": k, "loss": 1.0})
    assert lines == ["step=0 loss=1", "step=8 loss=1", "step=16 loss=1"]
    ConsoleSink().write(RECORD.as_dict())
    assert log_line(RECORD) in capsys.readouterr().out


# plots and monitor


def records(n: int) -> list[dict]:
    rnd = random.Random(0)
    out = [
        dict(
            step=k,
            loss=3 - k / n + rnd.random(),
            lr=1e-4,
            grad_norm=None if k == 3 else 1.0,
            tgs=900.0,
            tgs_10=900.0,
            tgs_mean=880.0,
        )
        for k in range(n)
    ]
    out[0] |= {"valid_loss": 3.5, "valid_loss/en": 3.25}
    return out


def test_plots_have_titles_labels_and_lines(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    fig = plot_run(records(30), title="a run", source="invented")
    for ax in fig.axes:
        assert ax.get_title() and ax.get_xlabel() == "step" and ax.get_ylabel() and ax.lines
        assert all(len(np.asarray(line.get_xdata())) for line in ax.lines)
    assert [line.get_label() for line in fig.axes[0].lines][1:] == [
        "train, mean of ~20 steps",
        "validation",
        "validation, en",
    ]
    assert list(np.asarray(fig.axes[2].lines[1].get_xdata())) == [3]
    assert pyplot.get_fignums() == before  # the current figure of others is left alone
    compared = compare_runs({"a": records(30), "b": records(10)}, keys=["loss", "lr", "nothing"])
    assert len(compared.axes) == 3 and compared.png().startswith(b"\x89PNG")


def test_plots_of_a_folder(tmp_path):
    assert len(save_plots(tmp_path)) == 5  # nothing there yet: pictures that say so
    sink = JsonlSink(tmp_path)
    for r in records(8):
        sink.write(r)
    first = [p.read_bytes() for p in save_plots(tmp_path)]
    assert [p.read_bytes() for p in save_plots(tmp_path)] == first  # the same numbers, the same bytes
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == [
        "grad_norm.png",
        "loss.png",
        "lr.png",
        "overview.png",
        "throughput.png",
    ]
    assert series(records(8), "grad_norm")[0] == [0, 1, 2, 4, 5, 6, 7]


@PROPERTY
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.floats(1, 50))
def test_smoothing_is_a_weighted_mean(values, span):
    keep = 1 - 2 / (span + 1)
    for n, got in enumerate(smooth(values, span), 1):
        weights = [keep ** (n - 1 - i) for i in range(n)]
        assert got == pytest.approx(np.average(values[:n], weights=weights), rel=1e-9, abs=1e-9)


def test_live_plot_keeps_its_rhythm_and_its_size():
    clock, drawn = [0.0], []
    live = LivePlot(
        total_steps=200,
        every_s=10,
        every_steps=3,
        show=lambda p, line: drawn.append(line),
        most=50,
        clock=lambda: clock[0],
        records=records(5),
    )
    for k in range(5, 205):
        clock[0] += 1.0
        live.write({"step": k, "loss": 1.0})
    assert len(live.records) <= 51 and live.records[-1]["step"] == 204 and "valid_loss" in live.records[0]
    assert 19 <= len(drawn) <= 21 and drawn[0].startswith("step 7 of 200")
    live.close()
    live.close()
    assert drawn[-1].startswith("step 204") and len(drawn) <= 22


def test_thin_keeps_order_and_validation():
    many = [{"step": k, **({"valid_loss": 1.0} if k % 9 == 0 else {})} for k in range(500)]
    steps = [r["step"] for r in thin(many, 100)]
    assert steps == sorted(set(steps)) and steps[-1] == 499 and set(range(0, 500, 9)) <= set(steps)


def test_live_plot_in_a_kernel_draws_anew_after_closing(monkeypatch):
    "A run that is interrupted and goes on in the next cell is shown there"
    import IPython.display

    shown = []

    class Handle:
        def update(self, part):
            shown.append("update")

    monkeypatch.setattr("internlm_nb.observe.monitor.in_notebook", lambda: True)
    monkeypatch.setattr(
        IPython.display, "display", lambda part, display_id: shown.append(type(part).__name__) or Handle()
    )
    live = LivePlot(every_s=0)
    live.write({"step": 0, "loss": 1.0})
    live.write({"step": 1, "loss": 1.0})
    live.close()
    live.write({"step": 2, "loss": 1.0})
    assert shown == ["Image", "Pretty", "update", "update", "Image", "Pretty"]


def test_progress_bar_is_silent_in_a_log():
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        with progress_bar(5) as bar:
            bar.update(5)
        assert out.getvalue() == ""
        with progress_bar(5, initial=2, disable=False) as bar:
            assert bar.n == 2
    assert "2/5" in out.getvalue()


# profiler


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=6))
def test_ranges_cover_what_was_asked(parts):
    text = ",".join(f"{a}-{a + n}" if n else str(a) for a, n in parts)
    ranges = parse_steps(text)
    covered = [s for a, b in ranges for s in range(a, b + 1)]
    assert covered == sorted({s for a, n in parts for s in range(a, a + n + 1)})
    assert all(b + 1 < c for (_, b), (c, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("bad", ["3-", "-3", "a", "1;2", "5-3", "1.5", "1-2-3"])
def test_bad_ranges_are_named(bad):
    with pytest.raises(ValueError, match="no step or range"):
        parse_steps(f"1,{bad}")


def test_profiler_records_its_steps_alone(tmp_path, caplog):
    p = StepProfiler(tmp_path, "1-2,5", memory=True, rank=3)
    a = torch.randn(16, 16)
    for k in range(4):
        with p.step(k):
            torch.mm(a, a)
    with pytest.raises(RuntimeError, match="a step that fails"):
        for k in range(4, 9):
            with p.step(k):
                torch.mm(a, a)
                if k == 5:
                    raise RuntimeError("a step that fails")
    p.close()
    names = sorted(f.name for f in (tmp_path / "profile").iterdir())
    assert names == [
        "steps_1-2_rank3.trace.json",
        "steps_1-2_rank3.txt",
        "steps_5-5_rank3.trace.json",
        "steps_5-5_rank3.txt",
    ]
    for name, calls in (("steps_1-2", 2), ("steps_5-5", 1)):
        trace = json.loads((tmp_path / f"profile/{name}_rank3.trace.json").read_text())
        assert sum(e.get("name") == "aten::mm" for e in trace["traceEvents"]) == calls
        assert "aten::mm" in (tmp_path / f"profile/{name}_rank3.txt").read_text()
    assert torch.cuda.is_available() or caplog.text.count("memory snapshots need CUDA") == 1


def test_profiler_off_makes_nothing(tmp_path):
    p = StepProfiler(tmp_path)
    with p.step(0):
        pass
    p.close()
    assert list(tmp_path.iterdir()) == []


def test_light_imports():
    "Neither TensorBoard nor IPython nor matplotlib is loaded by sinks and metrics"
    code = "import sys, internlm_nb.observe.sinks, internlm_nb.train.schedules; print([m for m in ('matplotlib', 'tensorboard', 'IPython', 'fastcore', 'nbdev') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert sinks_module.METRICS_FILE == "metrics.jsonl" and time.monotonic() > 0

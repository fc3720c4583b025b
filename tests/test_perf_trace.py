"The laws of a trace: it is what real ranks do, its FLOPs and bytes are the closed forms', and ranks that part are named"

from __future__ import annotations

import gc
import json
import random
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from internlm_nb.apps.runfile import load_run_file, names_of, shipped_runs
from internlm_nb.data.config import DataConfig
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.flops import step_flops
from internlm_nb.observe.metrics import TypeMeter
from internlm_nb.parallel.mesh import destroy, make_mesh, single
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.parallel.record import Recorder
from internlm_nb.perf.agreement import check_ranks, disagreements, launched
from internlm_nb.perf.blocks import alive, by_owner
from internlm_nb.perf.trace import a_pack, trace_step
from internlm_nb.train.config import LogConfig, ParallelConfig, RunConfig, TrainConfig, ZeroConfig
from internlm_nb.train.parallelize import build, layout_of
from internlm_nb.train.step import train_step
from internlm_nb.train.traffic import step_traffic
from internlm_nb.zero.hybrid import held_bytes

LENGTHS = (24, 8, 20, 12)  # of a pack's documents


def run_of(
    micro_num: int = 4,
    precision: Any = "float32",
    recompute: tuple[float, Any] = (0.0, "full"),
    zero: dict | None = None,
    model: dict | None = None,
    **parallel: Any,
) -> RunConfig:
    sizes: dict[str, Any] = dict(
        vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=4, mlp_ratio=2.0, multiple_of=16
    )
    return RunConfig(
        "lab",
        ModelConfig("internlm2", **sizes | (model or {})),
        DataConfig(seq_len=32, micro_bsz=2, micro_num=micro_num),
        train=TrainConfig(steps=4, precision=precision, recompute=recompute[0], recompute_policy=recompute[1]),
        parallel=ParallelConfig(**parallel),
        zero=ZeroConfig(**zero or {}),
        log=LogConfig(sinks=()),
    )


WIDE = dict(hidden_size=128, vocab_size=2048, num_layers=6)
FP8 = TrainConfig(precision="bfloat16", fp8="tensorwise")
MOE = dict(num_experts=4, experts_per_token=2, capacity_factor=1.0, num_shared_experts=1)
RUNS: dict[str, RunConfig] = {
    "data": run_of(),
    "(2, 2, 4)": run_of(zero=dict(param=2, grad=2, optim=4)),
    "(4, 4, 4), step": run_of(zero=dict(param=4, grad=4, optim=4, reshard="step"), recompute=(0.5, "full")),
    "offload": run_of(zero=dict(optim=4, offload=True)),
    "mtp": run_of(tensor=2, recompute=(1.0, "selective")),
    "msp (1, 1, 2)": run_of(tensor=2, mode="msp", zero=dict(optim=2)),
    "fsp (1, 1, 2)": run_of(tensor=2, mode="fsp", zero=dict(optim=2), recompute=(1.0, "full")),
    "sequence": run_of(sequence=4, zero=dict(param=2, grad=2, optim=4)),
    "context": run_of(context=4),
    "sequence, context": run_of(sequence=2, context=2, zero=dict(param=4, grad=4, optim=4)),
    "1f1b": run_of(pipeline=2, zero=dict(optim=2)),
    "interleaved": run_of(pipeline=2, schedule="interleaved", chunks=2),
    "zbh1, msp": run_of(pipeline=2, schedule="zbh1", tensor=2, mode="msp"),
    "zbv": run_of(8, pipeline=4, schedule="zbv", chunks=2, model=dict(num_layers=8)),
    "zbv, (2, 2, 2)": run_of(8, pipeline=2, schedule="zbv", chunks=2, zero=dict(param=2, grad=2, optim=2)),
    "experts": run_of(expert=4, model=MOE, zero=dict(optim=4)),
    "experts, tied": run_of(expert=2, model=MOE | dict(tie_embeddings=True), zero=dict(param=2, grad=2, optim=2)),
}
IN_CI = ["(4, 4, 4), step", "fsp (1, 1, 2)", "sequence, context", "zbh1, msp", "zbv", "experts"]


def recorded(world: int, runs: list[RunConfig]) -> list[list[tuple]]:
    "On a real rank: launches and waits of each run's second step"
    out = []
    for run in runs:
        recorder = Recorder(events=True)
        mesh = make_mesh(layout_of(run, world), recorder=recorder)
        built = build(run, mesh)
        for _ in range(2):
            recorder.reset()
            built.optimizer.set_schedule(0, run.train.steps)
            batches = [a_pack(run, LENGTHS, mesh) for _ in range(run.data.micro_num // mesh.layout.data)]
            targets = sum(b.num_targets for b in batches)
            train_step(built.model, built.optimizer, batches, targets, TypeMeter(["all"]), mesh=mesh)
            mesh.check_waited()
        out.append([facts(e.kind, e.call) for e in recorder.events])
        built.engine.remove()
    return out


def facts(kind: str, call: Any) -> tuple:
    return kind, call.op, call.axis, call.purpose, call.payload_bytes, call.sent_bytes, call.ranks, call.messages


def hold(names: list[str], world: int = 4) -> None:
    runs = [RUNS[name] for name in names]
    real = run_ranks(recorded, world, world, runs, timeout=300)
    for i, name in enumerate(names):
        for rank in range(world):
            trace = trace_step(runs[i], world, rank, lengths=LENGTHS)
            have = [facts(e.kind, e.call) for e in trace.exchanges]
            assert have, name
            for place, (a, b) in enumerate(zip(have, real[rank][i])):
                assert a == b, f"{name}, rank {rank}, event {place}"
            assert len(have) == len(real[rank][i]), f"{name}, rank {rank}"


def test_real_ranks_record_what_a_trace_says():
    hold(IN_CI)


@pytest.mark.slow
def test_all_layouts_record_what_their_traces_say():
    hold([name for name in RUNS if name not in IN_CI])


# ---- memory: against a real step of one process


def real_memory(run: RunConfig) -> tuple[int, dict[str, int]]:
    "Peak of the CPU allocator over a second step's start, and bytes by owner before it"
    mesh = single("cpu")
    built = build(run, mesh)
    for _ in range(2):
        built.optimizer.set_schedule(0, run.train.steps)
        batches = [a_pack(run, LENGTHS, mesh) for _ in range(run.data.micro_num)]
        meter, targets = TypeMeter(["all"]), sum(b.num_targets for b in batches)
        held = held_bytes(built.engine)
        moments = [t for s in built.optimizer.inner.state.values() for key, t in s.items() if key != "step"]
        held["moments"] = sum(t.numel() * t.element_size() for t in moments)
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            out = train_step(built.model, built.optimizer, batches, targets, meter, mesh=mesh)
        del out
    with TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    reports = [e for e in events if e.get("name") == "[memory]"]
    reports.sort(key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in reports]
    return max(totals) - (totals[0] - reports[0]["args"]["Bytes"]), held


@pytest.mark.parametrize(
    "run",
    [
        run_of(2, "bfloat16", model=WIDE),
        run_of(2, "bfloat16", (1.0, "full"), model=WIDE),
        pytest.param(run_of(2, "bfloat16", (1.0, "selective"), model=WIDE), marks=pytest.mark.slow),
        pytest.param(run_of(2, "float32", model=WIDE), marks=pytest.mark.slow),
        pytest.param(run_of(2, "bfloat16", zero=dict(offload=True), model=WIDE), marks=pytest.mark.slow),
    ],
    ids=["bfloat16", "full", "selective", "float32", "offload"],
)
def test_memory_is_that_of_a_real_step(run):
    peak, held = real_memory(run)
    trace = trace_step(run, device="cpu", lengths=LENGTHS, steps=2)
    state = trace.state() | {f"host {k}": v for k, v in by_owner(alive(trace.blocks, trace.begin), host=True).items()}
    where = "host " if run.zero.offload else ""
    assert state["parameters"] == held["parameters"]
    assert state.get("gradients", 0) == held["gradients"]
    for owner in ("masters", "moments"):
        assert state.get(where + owner, 0) == held[owner], owner
    assert abs((trace.peak()[0] - sum(trace.state().values())) / peak - 1) < 0.01


# ---- arithmetic


def by_model(trace) -> float:
    "FLOPs with attention's backward as the field counts it: twice its forward, where kernels do 2.5 times"
    return trace.flops - sum(w.flops for w in trace.work if "attn" in w.op and w.at.phase == "backward") / 5


@pytest.mark.parametrize(
    "world, changes",
    [
        (1, dict()),
        (4, dict(zero=dict(param=2, grad=2, optim=4))),
        (2, dict(tensor=2, mode="fsp")),
        (2, dict(sequence=2)),
        (2, dict(pipeline=2, schedule="zbv", chunks=2)),
        (2, dict(expert=2, model=dict(num_experts=4, experts_per_token=2))),
    ],
)
def test_flops_are_the_closed_form(world, changes):
    run = run_of(4, "bfloat16", **changes)
    layout = layout_of(run, world)
    ranks = range(world) if layout.pipeline > 1 else [0]
    total = sum(by_model(trace_step(run, world, rank, lengths=LENGTHS)) for rank in ranks)
    share = 1 if layout.pipeline > 1 else world
    closed = step_flops(run.model, LENGTHS * run.data.micro_num, run.data.seq_len)
    assert total == pytest.approx(closed.causal / share, rel=1e-12)


# ---- ranks that agree, and ranks that do not


def small(run: RunConfig) -> tuple[RunConfig, int]:
    "A shipped run with its settings, on a model of a few small layers, and the ranks that it is traced for"
    p, layers = run.parallel, run.parallel.pipeline * run.parallel.chunks * 2
    cfg = replace(
        run.model,
        num_layers=layers,
        hidden_size=8 * run.model.num_heads,
        head_dim_override=None,
        vocab_size=512,
        multiple_of=8,
    )
    world = p.tensor * p.sequence * p.context * p.pipeline * max(2, p.expert)
    world *= -(-max(run.zero.param, run.zero.grad, run.zero.optim, 1) // 2) if run.zero.optim > 0 else 1
    return replace(run, model=cfg, data=replace(run.data, seq_len=64, micro_num=8 * world)), world


@pytest.mark.parametrize("name", names_of(shipped_runs()))
def test_ranks_of_shipped_runs_agree(name):
    run, world = small(load_run_file(name, shipped_runs()).run())
    ranks = range(world) if world <= 8 else sorted({0, 1, world // 2, world - 1})
    traces = check_ranks(run, world, ranks)
    assert all(launched(t) for t in traces.values())


@pytest.mark.parametrize("name", ["zbv, (2, 2, 2)", "msp (1, 1, 2)", "context"])
def test_any_lost_exchange_is_found(name):
    traces = {rank: trace_step(RUNS[name], 4, rank, lengths=LENGTHS) for rank in range(4)}
    calls = {rank: launched(t) for rank, t in traces.items()}
    assert disagreements(calls) == []
    pick = random.Random(name)
    for _ in range(10):
        rank = pick.randrange(4)
        lost = pick.choice([i for i, c in enumerate(calls[rank]) if c.op != "send" or c.sent_bytes])
        broken = calls | {rank: calls[rank][:lost] + calls[rank][lost + 1 :]}
        found = disagreements(broken)
        assert any(rank in m.says for m in found), (rank, calls[rank][lost])
        assert any(m.axis == calls[rank][lost].axis for m in found)


# ---- what cannot be


def test_what_cannot_be_traced_is_said():
    run = run_of()
    with pytest.raises(ValueError, match="ranks count from 0 to 3"):
        trace_step(run, 4, 4)
    with pytest.raises(ValueError, match="cannot be traced yet"):
        trace_step(replace(run, train=FP8), 4)
    assert "off" in trace_step(run_of(zero=dict(check=True)), 4).remarks[0]
    with pytest.raises(ValueError, match="not a multiple"):
        trace_step(run, 3)
    destroy()
    assert not torch.distributed.is_initialized()  # a refusal leaves nothing behind


# ---- bytes: the closed form of a whole step


def counted(trace) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    out: dict[tuple[str, str, str], tuple[int, int, int]] = {}
    for e in trace.exchanges:
        if e.kind == "launch" and len(e.call.ranks) > 1:
            c, key = e.call, (e.call.axis, e.call.purpose, e.call.op)
            have = out.get(key, (0, 0, 0))
            out[key] = have[0] + 1, have[1] + c.payload_bytes, have[2] + c.sent_bytes
    return out


@pytest.mark.parametrize("name", RUNS)
def test_bytes_are_the_closed_form(name):
    run, world = RUNS[name], 4
    for rank in range(world):
        trace = trace_step(run, world, rank, lengths=LENGTHS)
        closed = step_traffic(run, layout_of(run, world), rank, LENGTHS)
        have = counted(trace)
        want = {key: (c.calls, c.payload_bytes, c.sent_bytes) for key, c in closed.items() if c.calls}
        assert have == want, f"{name}, rank {rank}"

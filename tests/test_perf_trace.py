"The laws of a trace: it is what real ranks do, its FLOPs and bytes are the closed forms', and ranks that part are named"

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from internlm_nb.apps.runfile import load_run_file, names_of, shipped_runs
from internlm_nb.data.config import DataConfig
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.flops import step_flops
from internlm_nb.observe.metrics import TypeMeter
from internlm_nb.parallel.mesh import destroy, make_mesh, single
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.parallel.record import Recorder
from internlm_nb.perf.agreement import check_ranks, disagreements, launched
from internlm_nb.perf.trace import a_pack, trace_step
from internlm_nb.train.config import LogConfig, ParallelConfig, RunConfig, TrainConfig, ZeroConfig
from internlm_nb.train.parallelize import build, layout_of
from internlm_nb.train.step import train_step

LENGTHS = (24, 40)  # of a pack's documents


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


MOE = dict(num_experts=4, experts_per_token=2, capacity_factor=1.0, num_shared_experts=1)
FACTORS = [(1, 1, 4), (1, 2, 4), (2, 2, 4), (4, 4, 4)]
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

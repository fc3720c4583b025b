"Small runs for the trainer's tests: a model that trains in a second, token files, and what must be equal between two runs"

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.data.loader import DataConfig
from internlm_nb.data.tokenfiles import write_tokens
from internlm_nb.model.config import ModelConfig
from internlm_nb.observe.sinks import read_metrics
from internlm_nb.run.trainer import Trainer
from internlm_nb.train.config import CheckpointConfig, LogConfig, RunConfig, TrainConfig
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.schedules import ScheduleConfig

TINY = ModelConfig(
    family="internlm2",
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_ratio=2.0,
    multiple_of=16,
)
TIMES = {
    "data_wait_s",
    "memory_bytes",
    "tgs",
    "tgs_10",
    "tgs_50",
    "tgs_mean",
    "tflops",
    "mfu",
    "mfu_causal",
    "hfu",
    "fwd_bwd_time",
}
SECTIONS = {
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}


def tiny_run(model: ModelConfig = TINY, name: str = "tiny", **fields: Any) -> RunConfig:
    "A run of ten float32 steps on synthetic data; `train_steps=3` sets train.steps, `schedule=...` the schedule"
    run = RunConfig(
        name, model, DataConfig(seq_len=32, micro_bsz=2, micro_num=2, valid_packs=2, prefetch=0), OptimConfig(lr=3e-3, schedule=ScheduleConfig(warmup_ratio=0.2)),
        TrainConfig(steps=10, precision="float32"), CheckpointConfig(every=5), LogConfig(sinks=(), progress=False, peak_tflops=1.0),
    )  # fmt: skip
    return with_fields(run, **fields)


def with_fields(run: RunConfig, **fields: Any) -> RunConfig:
    "The run with some fields changed: train_steps is train.steps"
    for name, value in fields.items():
        section, _, field = name.partition("_")
        if section == "schedule" and not field:
            run = replace(run, optim=replace(run.optim, schedule=value))
        else:
            run = replace(run, **{section: replace(getattr(run, section), **{field: value})})
    return run


def trainer(run: RunConfig, folder: Path, said: list[str] | None = None, **kw: Any) -> Trainer:
    "A trainer that keeps quiet, or writes into a list"
    return Trainer(run, folder, say=(lambda line: None) if said is None else said.append, **kw)


def facts(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    "The records of a run without what depends on the clock"
    path = folder / name
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(path)] if path.exists() else []


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    "Everything a checkpoint holds"
    checkpoint = Checkpoint(folder / "checkpoints" / str(step))
    return {n: checkpoint.read(n) for n in checkpoint.names}


def train_state(folder: Path, step: int) -> dict:
    return dict(Checkpoint(folder / "checkpoints" / str(step)).state["train"])


def same(a: Path, b: Path, step: int) -> None:
    "Two runs are the same to the last bit: weights, moments, loss scale, integers, metrics, validations"
    x, y = tensors(a, step), tensors(b, step)
    assert x.keys() == y.keys()
    different = [n for n in x if not torch.equal(x[n], y[n])]
    assert not different, different[:5]
    assert train_state(a, step) == train_state(b, step)
    assert facts(a) == facts(b)
    assert [r["step"] for r in facts(a)] == list(range(step))
    assert facts(a, "validation.jsonl") == facts(b, "validation.jsonl")


def write_folder(
    root: Path, kinds: tuple[str, ...] = ("en", "cn"), count: int = 60, top: int = 97, seed: int = 0
) -> Path:
    "A folder of token files with documents of mixed lengths, some tokens negative (no targets)"
    rng = np.random.default_rng(seed)
    for kind in kinds:
        docs = [(rng.integers(1, top, rng.integers(2, 50)) * rng.choice([1, 1, 1, -1])).tolist() for _ in range(count)]
        write_tokens(root / kind / "a.bin", docs)
    return root


def starts(folder: Path) -> list[dict]:
    return json.loads((folder / "config.json").read_text())["starts"]

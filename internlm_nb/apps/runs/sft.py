"""Supervised fine-tuning: prompts are context, answers are targets.

Make token files from Alpaca records with `scripts/prepare_data.py build`, then
    python scripts/train.py sft --data.train-folder TOKENS --checkpoint.init CHECKPOINT
"""

from internlm_nb.data.loader import DataConfig
from internlm_nb.model.config import preset
from internlm_nb.train.config import CheckpointConfig, RunConfig, TrainConfig
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.schedules import ScheduleConfig


def run() -> RunConfig:
    return RunConfig(
        name="sft",
        model=preset("internlm2-1.8b"),
        data=DataConfig(seq_len=2048, micro_bsz=1, micro_num=8),
        optim=OptimConfig(lr=2e-5, weight_decay=0.0, schedule=ScheduleConfig(warmup_ratio=0.03)),
        train=TrainConfig(steps=1000, recompute=1.0),
        checkpoint=CheckpointConfig(every=200),
    )


def prepare(run: RunConfig) -> RunConfig:
    "Fine-tuning on synthetic data, or of random weights, is never what was meant"
    if not run.data.train_folder:
        raise ValueError("sft needs data: --data.train-folder TOKENS, a folder made by scripts/prepare_data.py build")
    if not run.checkpoint.init and run.checkpoint.resume == "auto":
        print("note: no --checkpoint.init, so unless this run is resumed it starts from random weights")
    return run

"InternLM2 20B: sequences of 4096, activations recomputed, bf16"

from internlm_nb.data.loader import DataConfig
from internlm_nb.model.config import preset
from internlm_nb.train.config import CheckpointConfig, RunConfig, TrainConfig
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.schedules import ScheduleConfig


def run() -> RunConfig:
    return RunConfig(
        name="internlm2-20b",
        model=preset("internlm2-20b"),
        data=DataConfig(seq_len=4096, micro_bsz=1, micro_num=4),
        optim=OptimConfig(lr=3e-4, schedule=ScheduleConfig(warmup_ratio=0.01, min_lr=3e-5)),
        train=TrainConfig(steps=50_000, recompute=1.0),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000, snapshot_every=100),
    )

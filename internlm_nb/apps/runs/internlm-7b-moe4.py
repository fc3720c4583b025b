"InternLM 7B with four experts a block, two a token: sequences of 2048, packs of 2, 4 packs a step, bf16. On several ranks: --parallel.expert 4"

from internlm_nb.data.loader import DataConfig
from internlm_nb.model.config import preset
from internlm_nb.train.config import CheckpointConfig, RunConfig, TrainConfig
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.schedules import ScheduleConfig


def run() -> RunConfig:
    return RunConfig(
        name="internlm-7b-moe4",
        model=preset("internlm-7b-moe4"),
        data=DataConfig(seq_len=2048, micro_bsz=2, micro_num=4),
        optim=OptimConfig(lr=1e-4, schedule=ScheduleConfig(warmup_ratio=0.01, min_lr=1e-5)),
        train=TrainConfig(steps=50_000),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000, snapshot_every=100),
    )

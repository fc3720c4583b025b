"""InternLM2 1.8B: sequences of 4096, 500,000 steps of 4.2 million tokens are 2.1 trillion.
Recipe: InternLM2's technical report (arXiv:2403.17297): 4 million tokens a step, rate 3e-4 falling to a tenth, decay 0.1; 2,000 steps of warm-up are our choice.
Worlds: 8, 16, 32, 64, 128 or 256 GPUs of 80 GB."""

from internlm_nb import CheckpointConfig, DataConfig, OptimConfig, RunConfig, ScheduleConfig, TrainConfig, ZeroConfig, preset


def run() -> RunConfig:
    "All fields; the head of this file says for which worlds, and whose recipe it is"
    return RunConfig(
        name="internlm2-1.8b",
        model=preset("internlm2-1.8b"),
        data=DataConfig(seq_len=4096, micro_bsz=1, micro_num=1024),
        optim=OptimConfig(lr=3e-4, weight_decay=0.1, schedule=ScheduleConfig(warmup_ratio=0.004, min_lr=3e-5)),
        train=TrainConfig(steps=500_000),
        zero=ZeroConfig(optim=-1),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000, snapshot_every=100),
    )

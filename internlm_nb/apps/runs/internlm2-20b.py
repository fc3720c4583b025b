"""InternLM2 20B: sequences of 4096, activations recomputed, 500,000 steps of 5.2 million tokens are 2.6 trillion.
Recipe: InternLM2's technical report (arXiv:2403.17297): 5 million tokens a step, rate 3e-4 falling to a tenth, decay 0.1; 2,000 steps of warm-up are our choice.
Worlds: 32, 64, 128 or 256 GPUs of 80 GB."""

from internlm_nb import CheckpointConfig, DataConfig, OptimConfig, RunConfig, ScheduleConfig, TrainConfig, ZeroConfig, preset


def run() -> RunConfig:
    "All fields; the head of this file says for which worlds, and whose recipe it is"
    return RunConfig(
        name="internlm2-20b",
        model=preset("internlm2-20b"),
        data=DataConfig(seq_len=4096, micro_bsz=1, micro_num=1280),
        optim=OptimConfig(lr=3e-4, weight_decay=0.1, schedule=ScheduleConfig(warmup_ratio=0.004, min_lr=3e-5)),
        train=TrainConfig(steps=500_000, recompute=1.0),
        zero=ZeroConfig(grad=-1, optim=-1),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000, snapshot_every=100),
    )

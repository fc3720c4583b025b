"""InternLM 20B: packs of 2 x 2048 tokens, every matrix over 4 ranks, activations recomputed.
Recipe: InternLM's own configuration file: 131,072 tokens a step, rate 1e-4 falling to 1e-5, decay 0.01, 50,000 steps.
Worlds: 8, 16 or 32 GPUs of 80 GB."""

from internlm_nb import CheckpointConfig, DataConfig, OptimConfig, ParallelConfig, RunConfig, ScheduleConfig, TrainConfig, ZeroConfig, preset


def run() -> RunConfig:
    "All fields; the head of this file says for which worlds, and whose recipe it is"
    return RunConfig(
        name="internlm-20b",
        model=preset("internlm-20b"),
        data=DataConfig(seq_len=2048, micro_bsz=2, micro_num=32),
        optim=OptimConfig(lr=1e-4, schedule=ScheduleConfig(warmup_ratio=0.01, min_lr=1e-5)),
        train=TrainConfig(steps=50_000, recompute=1.0),
        parallel=ParallelConfig(tensor=4, mode="msp"),
        zero=ZeroConfig(optim=-1),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000, snapshot_every=100),
    )

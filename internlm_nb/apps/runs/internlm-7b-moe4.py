"""InternLM 7B with four experts a block, two for each token, the experts over 4 ranks: packs of 2 x 2048 tokens.
Recipe: InternEvo's 7B_MoE4 configuration: 131,072 tokens a step on 8 ranks, rate 1e-4 falling to 1e-5, decay 0.01, 50,000 steps, states over all ranks.
Worlds: 8, 16 or 32 GPUs of 80 GB."""

from internlm_nb import CheckpointConfig, DataConfig, OptimConfig, ParallelConfig, RunConfig, ScheduleConfig, TrainConfig, ZeroConfig, preset


def run() -> RunConfig:
    "All fields; the head of this file says for which worlds, and whose recipe it is"
    return RunConfig(
        name="internlm-7b-moe4",
        model=preset("internlm-7b-moe4"),
        data=DataConfig(seq_len=2048, micro_bsz=2, micro_num=32),
        optim=OptimConfig(lr=1e-4, schedule=ScheduleConfig(warmup_ratio=0.01, min_lr=1e-5)),
        train=TrainConfig(steps=50_000),
        parallel=ParallelConfig(expert=4),
        zero=ZeroConfig(optim=-1),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000, snapshot_every=100),
    )

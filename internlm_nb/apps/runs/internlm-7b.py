"""InternLM 7B, the step of the published scaling table: 4 packs of 2 x 2048 tokens for each of 8 ranks, no recomputation.
Recipe: InternLM's own configuration file: 131,072 tokens a step, rate 1e-4 falling to 1e-5, decay 0.01, 50,000 steps, gradients summed in bf16, optimizer states over 8 ranks.
Worlds: 8, 16 or 32 GPUs of 80 GB. On more, --data.micro-num 4 times their number keeps the table's step."""

from internlm_nb import CheckpointConfig, DataConfig, OptimConfig, RunConfig, ScheduleConfig, TrainConfig, ZeroConfig, preset


def run() -> RunConfig:
    "All fields; the head of this file says for which worlds, and whose recipe it is"
    return RunConfig(
        name="internlm-7b",
        model=preset("internlm-7b"),
        data=DataConfig(seq_len=2048, micro_bsz=2, micro_num=32),
        optim=OptimConfig(lr=1e-4, schedule=ScheduleConfig(warmup_ratio=0.01, min_lr=1e-5)),
        train=TrainConfig(steps=50_000),
        zero=ZeroConfig(optim=8, grad_dtype="param"),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000, snapshot_every=100),
    )

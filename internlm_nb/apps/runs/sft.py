"""Fine-tuning of InternLM2 1.8B: make tokens with `internlm-data build`, then `internlm-train sft --data.train-folder TOKENS --checkpoint.init CHECKPOINT`.
Recipe: Alpaca's: rate 2e-5, no decay, 3 % warm-up, and 8 packs of 2048 tokens are about its 128 records a step; 1000 steps read its 52,000 records three times.
Worlds: 1, 2, 4 or 8 GPUs of 80 GB."""

from internlm_nb import CheckpointConfig, DataConfig, OptimConfig, RunConfig, ScheduleConfig, TrainConfig, ZeroConfig, preset


def run() -> RunConfig:
    "All fields; the head of this file says for which worlds, and whose recipe it is"
    return RunConfig(
        name="sft",
        model=preset("internlm2-1.8b"),
        data=DataConfig(seq_len=2048, micro_bsz=1, micro_num=8),
        optim=OptimConfig(lr=2e-5, weight_decay=0.0, schedule=ScheduleConfig(warmup_ratio=0.03)),
        train=TrainConfig(steps=1000, recompute=1.0),
        zero=ZeroConfig(optim=-1),
        checkpoint=CheckpointConfig(every=200),
    )


def prepare(run: RunConfig) -> RunConfig:
    "Fine-tuning of random weights is never what was meant"
    if not run.checkpoint.init and run.checkpoint.resume == "auto":
        print("note: no --checkpoint.init, so unless this run is resumed it starts from random weights")
    return run

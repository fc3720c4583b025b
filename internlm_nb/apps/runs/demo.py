"""The demo: text to tokenizer to token files to a small trained model, in a few minutes on two CPU cores; no network, no GPU.
Recipe: our own, 500 steps of 1024 tokens; its data come with the package.
Worlds: 1 process."""

from internlm_nb import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, ScheduleConfig, TrainConfig
from internlm_nb.apps.demo import finish, prepare
from internlm_nb.train.precision import fast_bf16

__all__ = ["finish", "prepare", "run"]


def run() -> RunConfig:
    "All fields; the head of this file says for which worlds, and whose recipe it is"
    model = ModelConfig(
        family="internlm2", vocab_size=8192, hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=2,
        mlp_ratio=3.5, multiple_of=128, max_position_embeddings=256, rope_base=10_000.0,
    )  # fmt: skip
    return RunConfig(
        name="demo",
        model=model,
        data=DataConfig(seq_len=256, micro_bsz=4, micro_num=1, valid_packs=20, valid_micro_bsz=8),
        optim=OptimConfig(lr=2e-3, weight_decay=0.1, schedule=ScheduleConfig(warmup_ratio=0.05, min_lr=1e-4)),
        train=TrainConfig(steps=500, precision="bfloat16" if fast_bf16() else "float32", valid_every=125),
        checkpoint=CheckpointConfig(every=125, keep_last=2),
    )

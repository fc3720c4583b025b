"Products in float8, emulated on a CPU where torchao is installed, and on a GPU that has them"

import pytest
import torch

from internlm_nb.model.config import ModelConfig
from internlm_nb.model.loss import LossOutput
from internlm_nb.model.transformer import Transformer
from internlm_nb.train.config import RunConfig, TrainConfig
from internlm_nb.train.fp8 import fp8_linears
from internlm_nb.train.parallelize import build_model

CFG = ModelConfig(
    "llama", vocab_size=64, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_ratio=2.0, multiple_of=16
)


def loss_and_gradient(model, device="cpu"):
    ids = torch.arange(32, device=device) % 64
    out = model(ids, labels=ids.roll(-1))
    assert isinstance(out, LossOutput)
    (out.loss_sum / 32).backward()
    return float(out.loss_sum.detach()) / 32, model.blocks[0].feed_forward.w1.weight.grad.float()


def held_to_bf16(device, emulate):
    "e4m3 keeps 4 significant bits: a product is off by a few percent, a mean of 32 losses by much less"
    plain, eight = (Transformer(CFG, dtype=torch.bfloat16, device=device) for _ in range(2))
    names = fp8_linears(eight, "tensorwise", device, emulate=emulate)
    assert len(names) == 2 * 5 and list(plain.state_dict()) == list(eight.state_dict())
    (a, grad_a), (b, grad_b) = (loss_and_gradient(m, device) for m in (plain, eight))
    assert a != b and abs(a - b) < 0.02
    assert 0 < (grad_a - grad_b).norm() / grad_a.norm() < 0.2


def test_emulated_float8_is_near_bf16():
    pytest.importorskip("torchao")
    held_to_bf16("cpu", emulate=True)


@pytest.mark.gpu
def test_float8_is_near_bf16():
    pytest.importorskip("torchao")
    held_to_bf16("cuda", emulate=False)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"--train\.fp8 tensorwise is for --train\.precision bfloat16, not float32"):
        TrainConfig(precision="float32", fp8="tensorwise")
    run = RunConfig("x", CFG, train=TrainConfig(fp8="tensorwise"))
    with pytest.raises(ValueError, match=r"--train\.fp8 tensorwise cannot run here: .*; write --train\.fp8 none"):
        build_model(run, torch.device("cpu"))

"Configs: exact counts, sizes that fit, messages that name the field"

from dataclasses import fields, replace

import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.model.config import ModelConfig, num_params, preset, presets
from internlm_nb.model.transformer import Transformer

EXACT = {
    "internlm-7b": (4096, 32, 32, 32, 11008, 103168, 7_321_948_160),
    "internlm-7b-moe4": (
        4096,
        32,
        32,
        32,
        5632,
        103168,
        2 * 103168 * 4096 + 4096 + 32 * (2 * 4096 + 4 * 4096**2 + 4 * 4096 + 4 * (3 * 4096 * 5632 + 4096)),
    ),
    "internlm-20b": (5120, 40, 40, 60, 13824, 103168, 20_089_943_040),
    "internlm2-1.8b": (2048, 16, 8, 24, 8192, 92544, 1_889_110_016),
    "internlm2-7b": (4096, 32, 8, 32, 14336, 92544, 7_737_708_544),
    "internlm2-20b": (6144, 48, 8, 48, 16384, 92544, 19_861_149_696),
    "internlm3-8b": (4096, 32, 2, 48, 10240, 128512, 8_804_241_408),
    "llama2-7b": (4096, 32, 32, 32, 11008, 32000, 6_738_415_616),
}
TINY = ModelConfig("internlm2", 100, 48, 2, 6, 2, 2.0, multiple_of=16)


@pytest.mark.parametrize("name", EXACT)
def test_presets_are_exact_on_the_meta_device(name):
    cfg = preset(name)
    *shape, count = EXACT[name]
    assert [cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.num_layers, cfg.ffn_size, cfg.vocab_size] == shape
    assert sum(p.numel() for p in Transformer(cfg, device="meta").parameters()) == num_params(cfg) == count


def test_every_preset_is_in_the_table():
    assert set(presets()) >= set(EXACT)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kv=st.integers(1, 4), group=st.integers(1, 4), half=st.integers(1, 8), layers=st.integers(1, 3), vocab=st.integers(1, 200), ratio=st.floats(1.0, 5.0),
    multiple=st.integers(1, 64), flags=st.tuples(*[st.booleans()] * 5), own_width=st.booleans(), experts=st.integers(0, 4), shared=st.integers(0, 2),
)  # fmt: skip
def test_closed_form_equals_the_built_model(
    kv, group, half, layers, vocab, ratio, multiple, flags, own_width, experts, shared
):
    heads, head_dim = kv * group, 2 * half
    cfg = ModelConfig(
        "llama", vocab, 24 if own_width else heads * head_dim, layers, heads, kv, ratio, multiple, head_dim_override=head_dim if own_width else None,
        qkv_bias=flags[0], out_bias=flags[1], tie_embeddings=flags[2], norm_head=flags[3], qk_interleaved=flags[4],
        num_experts=experts, experts_per_token=min(2, max(1, experts)), num_shared_experts=shared if experts else 0,
    )  # fmt: skip
    model = Transformer(cfg, device="meta")
    assert sum(p.numel() for p in model.parameters()) == num_params(cfg)
    logits = model(torch.zeros(5, dtype=torch.int64, device="meta"))
    assert logits.shape == (5, vocab)


@pytest.mark.parametrize(
    "change",
    [
        dict(family="gpt"), dict(vocab_size=0), dict(hidden_size=-48), dict(num_layers=0), dict(num_heads=5), dict(num_kv_heads=4), dict(num_kv_heads=0),
        dict(mlp_ratio=0.0), dict(multiple_of=0), dict(intermediate_size=0), dict(head_dim_override=7), dict(max_position_embeddings=0), dict(rope_base=0.0),
        dict(rope_scaling="yarn"), dict(rope_scaling="linear", rope_factor=0.5), dict(rope_factor=2.0), dict(norm_eps=0.0), dict(embed_grad_scale=1.5),
        dict(init_std=-1.0), dict(init_std_embedding=-1.0), dict(hidden_size=48.0), dict(vocab_size=True), dict(intermediate_size=64.0), dict(mlp_ratio=0.01),
        dict(num_experts=-1), dict(num_experts=2.0), dict(num_experts=2, experts_per_token=3), dict(experts_per_token=0), dict(num_shared_experts=1), dict(capacity_factor=1.0),
        dict(num_experts=2, capacity_factor=-1.0), dict(num_experts=2, aux_loss_coef=-0.1), dict(num_experts=2, z_loss_coef=float("inf")), dict(num_experts=2, num_shared_experts=-1),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_field_is_named(change):
    with pytest.raises(ValueError) as error:
        replace(TINY, **change)
    assert any(name in str(error.value) or name.replace("_", "-") in str(error.value) for name in change), error.value


def test_an_unknown_preset_is_answered_with_near_names():
    with pytest.raises(ValueError, match="did you mean internlm2-20b"):
        preset("internlm2_20b")
    with pytest.raises(ValueError, match="choose one of internlm-7b"):
        preset("zzz")


def test_every_field_can_be_given_on_a_command_line():
    "The config is offered field by field to a command line"
    got = tyro.cli(
        ModelConfig,
        default=TINY,
        args=["--rope-scaling", "linear", "--rope-factor", "2", "--intermediate-size", "64", "--norm-head"],
    )
    assert got == replace(TINY, rope_scaling="linear", rope_factor=2.0, intermediate_size=64, norm_head=True)
    assert all(
        f.type in (int, float, bool) or "None" in str(f.type) or "Literal" in str(f.type) for f in fields(ModelConfig)
    )

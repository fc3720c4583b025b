"Folders as others write them: transformers itself, and the releases of InternLM 1, 2 and 3 with their own names and config keys"

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from internlm_nb.checkpoint.durable import CheckpointError
from internlm_nb.hub.huggingface import from_hf, to_hf

SIZES = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=16,
    rms_norm_eps=1e-6,
)
LONG = torch.arange(40) * 7 % 61  # beyond max_position_embeddings


@pytest.fixture(autouse=True)
def quiet():
    "These folders have no tokenizer, which from_hf would say each time"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no tokenizer is loaded.*")
        yield


def llama(**changes) -> LlamaForCausalLM:
    "transformers' model, with weights large enough that every mistake shows"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1 if p.dim() == 1 and p.shape[0] == 48 else 0))
    return model


@torch.no_grad()
def agree(model, theirs) -> None:
    "Logits equal to 1e-5 of the largest, uncached and fresh"
    ours, reference = model(LONG), theirs(LONG[None], use_cache=False).logits[0]
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        dict(), dict(attention_bias=True), dict(tie_word_embeddings=True), dict(head_dim=16), dict(num_key_value_heads=6),
        dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)), dict(rope_parameters=dict(rope_type="linear", rope_theta=1e6, factor=4.0)),
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=3.0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_folders_of_transformers(tmp_path, changes, shard):
    "save_pretrained -> from_hf computes the same, and goes out and into transformers again with the same bits"
    theirs = llama(**changes)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) == 1 or shard == "20KB"
    model, _ = from_hf(tmp_path / "theirs")
    agree(model, theirs)
    to_hf(model, None, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in again.state_dict().items())


def released(folder, theirs, config: dict, rename) -> None:
    "A folder as a release has it, from transformers' tensors"
    folder.mkdir()
    tensors = rename({n: t.clone() for n, t in theirs.state_dict().items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shared = {k: v for k, v in SIZES.items() if k in config or k != "num_key_value_heads"}
    (folder / "config.json").write_text(
        json.dumps(
            shared
            | {
                "auto_map": {"AutoConfig": "configuration.Config"},
                "hidden_act": "silu",
                "use_cache": True,
                "pad_token_id": 2,
            }
            | config
        )
    )


@pytest.mark.parametrize(
    "rotary, rope",
    [
        (dict(base=10000, type="origin"), dict(rope_type="default", rope_theta=1e4)),
        (dict(base=10000, type="dynamic"), dict(rope_type="dynamic", rope_theta=1e4, factor=1.0)),
        (dict(base=1e6, type="dynamic", scaling_factor=2.0), dict(rope_type="dynamic", rope_theta=1e6, factor=2.0)),
        (None, dict(rope_type="default", rope_theta=1e4)),
    ],
)
def test_internlm_as_released(tmp_path, rotary, rope):
    "Version 1: Llama's names, `bias` for q, k, v and o, rotary in a key of its own; older folders have no such key"
    theirs = llama(attention_bias=True, num_key_value_heads=6, rope_parameters=rope)
    config = dict(model_type="internlm", architectures=["InternLMForCausalLM"], bias=True) | (
        dict(rotary=rotary) if rotary else {}
    )

    def rename(t):
        return t | {
            f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)
        }  # as older files have

    released(tmp_path / "v1", theirs, config, rename)
    model, _ = from_hf(tmp_path / "v1")
    assert model.cfg.family == "internlm" and model.cfg.qkv_bias and model.cfg.out_bias and model.cfg.norm_eps == 1e-6
    agree(model, theirs)
    to_hf(model, None, tmp_path / "again", layout="internlm")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["bias"] is True and again["rotary"]["type"] == (rotary or {}).get("type", "origin")
    assert all(torch.equal(a, b) for a, b in zip(from_hf(tmp_path / "again")[0].parameters(), model.parameters()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", [None, dict(type="dynamic", factor=2.0), dict(type="linear", factor=2.0)])
def test_internlm2_as_released(tmp_path, bias, scaling):
    "Version 2: its own names, wqkv of shape (kv groups, query heads of the group + 2, head_dim) as its code views it"
    rope = dict(rope_theta=1e6, rope_type=(scaling or {}).get("type", "default")) | (
        dict(factor=2.0) if scaling else {}
    )
    theirs = llama(attention_bias=bias, rope_parameters=rope)

    def rename(t):
        out = {
            "model.tok_embeddings.weight": t["model.embed_tokens.weight"],
            "output.weight": t["lm_head.weight"],
            "model.norm.weight": t["model.norm.weight"],
        }
        for i in range(2):
            at = f"model.layers.{i}"
            for kind in ("weight", "bias") if bias else ("weight",):
                q, k, v = (
                    t[f"{at}.self_attn.{x}_proj.{kind}"].unflatten(0, (2, -1, 8)) for x in "qkv"
                )  # (kv groups, heads, head_dim, …)
                out[f"{at}.attention.wqkv.{kind}"] = torch.cat([q, k, v], dim=1).flatten(0, 2)
                out[f"{at}.attention.wo.{kind}"] = t[f"{at}.self_attn.o_proj.{kind}"]
            for ours, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                out[f"{at}.feed_forward.{ours}.weight"] = t[f"{at}.mlp.{name}_proj.weight"]
            out[f"{at}.attention_norm.weight"], out[f"{at}.ffn_norm.weight"] = (
                t[f"{at}.input_layernorm.weight"],
                t[f"{at}.post_attention_layernorm.weight"],
            )
        return out

    released(
        tmp_path / "v2",
        theirs,
        dict(model_type="internlm2", num_key_value_heads=2, bias=bias, rope_theta=1000000, rope_scaling=scaling),
        rename,
    )
    model, _ = from_hf(tmp_path / "v2")
    assert model.cfg.family == "internlm2"
    agree(model, theirs)
    to_hf(model, None, tmp_path / "llama")
    agree(model, AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32))
    assert from_hf(tmp_path / "llama")[0].cfg == model.cfg


def test_internlm3_as_released(tmp_path):
    "Version 3: Llama's names, head_dim and the bias of q, k, v in keys of their own"
    theirs = llama(head_dim=16, rope_parameters=dict(rope_type="dynamic", rope_theta=5e7, factor=6.0))
    config = dict(
        model_type="internlm3",
        num_key_value_heads=2,
        head_dim=16,
        bias=False,
        qkv_bias=False,
        rope_theta=50000000,
        rope_scaling=dict(rope_type="dynamic", factor=6.0),
    )
    released(tmp_path / "v3", theirs, config, lambda t: t)
    model, _ = from_hf(tmp_path / "v3")
    assert model.cfg.family == "internlm3"
    agree(model, theirs)
    released(tmp_path / "biased", theirs, config | dict(qkv_bias=True), lambda t: t)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0.self_attn\.q_proj\.bias"):
        from_hf(tmp_path / "biased")

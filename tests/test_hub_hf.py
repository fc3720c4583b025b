"Hugging Face folders: every shape of model goes out and comes back bit for bit, computes the same in transformers, and nothing that does not fit is let in"

import json
import shutil
import subprocess
import sys
import textwrap
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from internlm_nb.checkpoint.durable import CheckpointError
from internlm_nb.checkpoint.logical import gather_state, load_into, save_state
from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.checkpoint.regions import Chunk
from internlm_nb.hub.hf_config import read_config, write_config
from internlm_nb.hub.huggingface import HFCheckpoint, from_hf, hf_to_native, native_to_hf, to_hf
from internlm_nb.hub.rows import (
    group_stacked,
    groups_to_halves,
    groups_to_pairs,
    join_groups,
    split_groups,
    stack_groups,
    to_halves,
    to_pairs,
)
from internlm_nb.hub.source import Weights
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.init import allocate, normal_slice
from internlm_nb.model.segments import Segments
from internlm_nb.model.transformer import Transformer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def quiet():
    "These folders have no tokenizer, which from_hf would say each time"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no tokenizer is loaded.*")
        yield


def noisy(cfg: ModelConfig, dtype=torch.float32) -> Transformer:
    "Weights that are not near zero, norms and biases that are not trivial, each tensor its own"
    model = Transformer(cfg, dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = normal_slice(1, name, 0, p.numel(), 0.2).view(p.shape)
            p.copy_(1 + noise if name.endswith("norm.weight") else noise)
    return model


def same(a: Transformer, b: Transformer) -> bool:
    "The same names, types and bits"
    left, right = gather_state(a, ""), gather_state(b, "")
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


@st.composite
def configs(draw) -> ModelConfig:
    "Small models of all families and shapes"
    kv_heads, group, head_dim = (
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([4, 8])),
    )
    heads = kv_heads * group
    hidden = draw(st.sampled_from([heads * head_dim, heads * 6]))
    scaling = draw(st.sampled_from(["none", "linear", "dynamic"]))
    return ModelConfig(
        draw(st.sampled_from(["internlm", "internlm2", "internlm3", "llama"])), vocab_size=draw(st.integers(3, 40)), hidden_size=hidden, num_layers=draw(st.integers(1, 3)),
        num_heads=heads, num_kv_heads=kv_heads, mlp_ratio=draw(st.sampled_from([2.0, 8 / 3, 3.5])), multiple_of=draw(st.sampled_from([4, 16])),
        intermediate_size=draw(st.sampled_from([None, 24])), head_dim_override=None if hidden == heads * head_dim else head_dim, max_position_embeddings=draw(st.sampled_from([16, 4096])),
        rope_base=draw(st.sampled_from([1e4, 1e6, 5e7])), rope_scaling=scaling, rope_factor=1.0 if scaling == "none" else draw(st.sampled_from([1.0, 2.0, 4.0])),
        qkv_bias=draw(st.booleans()), out_bias=draw(st.booleans()), norm_eps=draw(st.sampled_from([1e-5, 1e-6])), qk_interleaved=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()), embed_grad_scale=draw(st.sampled_from([1.0, 0.1])), init_std=draw(st.sampled_from([0.02, 0.006])), init_std_embedding=draw(st.sampled_from([None, 0.0052])),
    )  # fmt: skip


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_row_orders_are_exact_inverses(data):
    "Any two maps that undo each other do so for weights and biases, and no row is lost"
    kv_heads, group, dim = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)), 2 * data.draw(st.integers(1, 4))
    heads, rest = kv_heads * group, data.draw(st.sampled_from([(), (5,), (3, 2)]))
    x = torch.randn((heads + 2 * kv_heads) * dim, *rest)
    assert torch.equal(join_groups(*split_groups(x, heads, kv_heads), kv_heads), x)
    assert torch.equal(group_stacked(stack_groups(x, heads, kv_heads), heads, kv_heads), x)
    assert torch.equal(stack_groups(group_stacked(x, heads, kv_heads), heads, kv_heads), x)
    assert torch.equal(groups_to_pairs(groups_to_halves(x, heads, kv_heads), heads, kv_heads), x)
    assert torch.equal(groups_to_halves(groups_to_pairs(x, heads, kv_heads), heads, kv_heads), x)
    assert torch.equal(to_pairs(to_halves(x, dim), dim), x) and torch.equal(to_halves(to_pairs(x, dim), dim), x)
    if not rest:
        assert torch.equal(stack_groups(x, heads, kv_heads).sort().values, x.sort().values)


@given(
    configs(),
    st.sampled_from(["llama", "internlm", "internlm2", "internlm3"]),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 20_000, 1 << 30]),
)
@settings(max_examples=36, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_bit_for_bit(tmp_path, cfg, layout, dtype, shard_bytes):
    "model -> folder -> model is the identity in every layout that has words for the model; so are the two streaming converters; shard sizes do not matter"
    place = tmp_path / "case"
    shutil.rmtree(place, ignore_errors=True)
    model = noisy(cfg, dtype)
    try:
        to_hf(model, None, place / "hf", shard_bytes=shard_bytes, layout=layout)
    except ValueError as error:
        assert layout != "llama" and str(error).split()[0] in ("num_kv_heads", "rope_scaling", "head_dim", "out_bias")
        assert not place.exists() or not list(place.iterdir())
        return
    back, tokenizer = from_hf(place / "hf")
    assert tokenizer is None and back.cfg == cfg and same(back, model)
    hf_to_native(place / "hf", place / "native", shard_bytes=shard_bytes)
    native = Checkpoint(place / "native")
    assert all(torch.equal(native.read(f"model.{n}"), p) for n, p in gather_state(model, "").items())
    native_to_hf(place / "native", place / "again", shard_bytes=shard_bytes, layout=layout)
    assert {p.name: p.read_bytes() for p in (place / "hf").iterdir()} == {
        p.name: p.read_bytes() for p in (place / "again").iterdir()
    }


@given(configs().filter(lambda c: c.hidden_size % c.num_heads == 0), st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_transformers_computes_the_same(tmp_path, cfg, norm_head):
    "Logits of the exported folder in transformers equal ours, float32; with norm_head the folder holds the normalised rows, bit for bit"
    cfg = replace(cfg, norm_head=norm_head)
    place = tmp_path / "hf"
    shutil.rmtree(place, ignore_errors=True)
    model = noisy(cfg)
    to_hf(model, None, place)
    theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    assert not theirs.training and type(theirs).__name__ == "LlamaForCausalLM"
    ids = (
        torch.arange(24) % cfg.vocab_size
    )  # beyond 16 positions, where dynamic rope starts to stretch in half of the cases
    with torch.no_grad():
        ours = model(ids)
        # 1e-5 of the largest logit: both are float32, and sum in different orders
        assert (theirs(ids[None]).logits[0] - ours).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1)
        back, _ = from_hf(place)
        assert back.cfg == replace(cfg, norm_head=False, tie_embeddings=cfg.tie_embeddings and not norm_head)
        assert torch.equal(back(ids), ours)


def test_packed_import_equals_single():
    "An imported configuration keeps its meaning in packs: dynamic rope by each sequence's own length"
    cfg, _ = read_config(write_config(ModelConfig("internlm", vocab_size=31, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, mlp_ratio=2.0,
                                                  multiple_of=8, max_position_embeddings=8, rope_scaling="dynamic", rope_factor=2.0), "internlm"))  # fmt: skip
    model = noisy(cfg)
    a, b = torch.arange(5), torch.arange(20) % 31
    with torch.no_grad():
        packed = model(torch.cat((a, b)), Segments.from_lengths([5, 20]))
        assert torch.allclose(packed, torch.cat((model(a), model(b))), atol=1e-5)


BASE = ModelConfig(
    "internlm2",
    vocab_size=37,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_ratio=2.0,
    multiple_of=8,
    rope_base=1e6,
)
K = "model.layers.1.self_attn.k_proj.weight"


def rewrite(folder: Path, change) -> None:
    "Change the tensors of a one-file folder"
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(K), f"missing: {K}"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"].clone()}),
            "too much: model.layers.2.mlp.up_proj.weight",
        ),
        (lambda t: t.update({K: t[K].T.contiguous()}), rf"{K}: has shape \(32, 16\), and \(16, 32\) is needed"),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:36].clone()}),
            r"lm_head.weight: has shape \(36, 32\)",
        ),
        (lambda t: t.update({K: t[K].to(torch.int8)}), f"{K}: is torch.int8"),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)}),
            "too much: model.layers.0.self_attn.o_proj.bias",
        ),
        (  # the feed-forward's down projection under the name of the gate: the older order of names
            lambda t: t.update(
                {"model.layers.0.mlp.gate_proj.weight": t["model.layers.0.mlp.down_proj.weight"].clone()}
            ),
            "model.layers.0.mlp.gate_proj.weight: has shape",
        ),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, change, words):
    "Each fault is named with its tensor, in from_hf and in the converter, which leaves nothing behind"
    to_hf(noisy(BASE), None, tmp_path / "hf")
    rewrite(tmp_path / "hf", change)
    with pytest.raises(CheckpointError, match=words):
        from_hf(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=words):
        hf_to_native(tmp_path / "hf", tmp_path / "native")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_tied_head(tmp_path):
    "A head beside a tied embedding is let pass when it is the embedding, and refused when it is not"
    cfg = replace(BASE, tie_embeddings=True)
    to_hf(noisy(cfg), None, tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert from_hf(tmp_path / "hf")[0].cfg == cfg
    rewrite(tmp_path / "hf", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight: differs from model.embed_tokens.weight.*tie_word_embeddings"
    ):
        from_hf(tmp_path / "hf")


def test_zero_biases_that_were_trained_since(tmp_path):
    "A model with biases on q, k, v alone comes back so; once somebody has trained the zeros of the output, it comes back with them"
    cfg = replace(BASE, qkv_bias=True)
    to_hf(noisy(cfg), None, tmp_path / "hf")
    assert from_hf(tmp_path / "hf")[0].cfg == cfg
    name = "model.layers.1.self_attn.o_proj.bias"
    rewrite(tmp_path / "hf", lambda t: t[name].add_(1))
    model, _ = from_hf(tmp_path / "hf")
    assert model.cfg == replace(cfg, out_bias=True) and torch.equal(model.blocks[1].attention.wo.bias, torch.ones(32))
    assert not model.blocks[0].attention.wo.bias.any()


@pytest.mark.parametrize(
    "change, field",
    [
        ({"model_type": "mixtral"}, "model_type"), ({"hidden_act": "gelu"}, "hidden_act"), ({"sliding_window": 4096}, "sliding_window"), ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "rope_scaling.rope_type"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type"), ({"hidden_size": None}, "hidden_size"), ({"num_attention_heads": 5}, "num_heads"),
        ({"rope_theta": 1e4}, "rope_theta"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6, "attention_factor": 2}}, "rope_parameters.attention_factor"), ({"rope_interleaved": True}, "rope_interleaved"),
    ],
)  # fmt: skip
def test_refuses_configs_by_field(tmp_path, change, field):
    "A config.json that asks for something else names the field, and the file"
    to_hf(noisy(BASE), None, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"config.json: .*{field}"):
        from_hf(tmp_path / "hf")


def test_files_that_cannot_be_trusted(tmp_path):
    "Pickles with code are refused unread, an index cannot point out of its folder, and truncated or missing shards are named"
    model = noisy(BASE)
    to_hf(model, None, tmp_path / "hf", shard_bytes=8000)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    outside = tmp_path / "elsewhere.safetensors"
    shard = sorted((tmp_path / "hf").glob("model-*"))[0]
    shutil.copy(shard, outside)
    for name in ("../elsewhere.safetensors", str(outside), "./../elsewhere.safetensors"):
        index.write_text(
            json.dumps(
                text | {"weight_map": {k: name if v == shard.name else v for k, v in text["weight_map"].items()}}
            )
        )
        with pytest.raises(CheckpointError, match="not the plain name"):
            from_hf(tmp_path / "hf")
    index.write_text(json.dumps(text))
    data = shard.read_bytes()
    shard.write_bytes(data[:-3])
    with pytest.raises(CheckpointError, match=f"{shard.name}: .* does not fit into its place"):
        from_hf(tmp_path / "hf")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: missing"):
        from_hf(tmp_path / "hf")
    shard.write_bytes(data)
    assert same(from_hf(tmp_path / "hf")[0], model)

    marker = tmp_path / "code-was-run"

    class Code:
        "Pickled as: make a file"

        def __reduce__(self):
            return Path.touch, (marker,)

    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    torch.save({"model.embed_tokens.weight": Code()}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        from_hf(tmp_path / "hf")
    assert not marker.exists()


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files(tmp_path, shards):
    "Folders of torch files, one or several, are read as safetensors ones are"
    model = noisy(replace(BASE, tie_embeddings=True))
    to_hf(model, None, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = list(tensors)
    files = (
        ["pytorch_model.bin"]
        if shards == 1
        else [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    )
    for i, file in enumerate(files):
        torch.save({n: tensors[n] for n in names[i::shards]}, tmp_path / "hf" / file)
    if shards > 1:
        where = {n: files[names.index(n) % shards] for n in names}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert same(from_hf(tmp_path / "hf")[0], model)
    hf_to_native(tmp_path / "hf", tmp_path / "native")
    native_to_hf(tmp_path / "native", tmp_path / "out")
    assert same(from_hf(tmp_path / "out")[0], model)


def test_casts_are_asked_for(tmp_path):
    "dtype=None keeps bits; a dtype converts on the way out or in, as .to does"
    model = noisy(BASE)
    to_hf(model, None, tmp_path / "bf16", dtype=torch.bfloat16)
    back, _ = from_hf(tmp_path / "bf16")
    assert same(back, noisy(BASE).to(torch.bfloat16))
    assert same(from_hf(tmp_path / "bf16", dtype=torch.float32)[0], noisy(BASE).to(torch.bfloat16).float())
    model.head.weight.data = model.head.weight.data.half()
    with pytest.raises(ValueError, match=r"head.weight is torch.float16 and embedding.weight torch.float32"):
        to_hf(model, None, tmp_path / "mixed")


def test_mixed_types(tmp_path):
    "Norms in float32 beside bfloat16: as transformers reads them, and with every bit when a wide type is asked for; through the converters too"
    model = noisy(BASE)
    to_hf(model, None, tmp_path / "hf", dtype=torch.bfloat16)
    norms = {
        n: 1 + t * 1e-3
        for n, t in load_file(to_hf(model, None, tmp_path / "wide") / "model.safetensors").items()
        if n.endswith("norm.weight")
    }
    rewrite(tmp_path / "hf", lambda t: t.update(norms))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for dtype in (None, torch.float32, torch.float64):
        back, _ = from_hf(tmp_path / "hf", dtype=dtype)
        assert {p.dtype for p in back.parameters()} == {dtype or torch.bfloat16}
        assert torch.equal(back.head.norm.weight, norms["model.norm.weight"].to(dtype or torch.bfloat16))
        assert dtype or torch.equal(back.head.norm.weight, theirs["model.norm.weight"])
        hf_to_native(tmp_path / "hf", tmp_path / str(dtype), dtype)
        native_to_hf(tmp_path / str(dtype), tmp_path / f"{dtype}-again")
        assert same(from_hf(tmp_path / f"{dtype}-again")[0], back)


def test_an_existing_folder_is_safe_and_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    "Never over an existing folder, whole or not at all"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        to_hf(noisy(BASE), None, tmp_path / "hf")
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert same(from_hf(to_hf(noisy(BASE), None, tmp_path / "empty"))[0], noisy(BASE))
    shutil.rmtree(tmp_path / "empty")
    from internlm_nb.hub import hf_files

    def full(tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_files, "raw", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        to_hf(noisy(BASE), None, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_native_checkpoint_that_does_not_fit_its_configuration(tmp_path):
    "native_to_hf names what is missing or of a wrong shape before it writes anything"
    tensors = gather_state(noisy(BASE))
    broken = {n: t for n, t in tensors.items() if n != "model.head.norm.weight"} | {
        "model.head.weight": torch.zeros(9, 32)
    }
    save_state(tmp_path / "native", broken, {"model": asdict(BASE)})
    with pytest.raises(
        CheckpointError, match=r"missing model.head.norm.weight.*model.head.weight: has shape \(9, 32\)"
    ):
        native_to_hf(tmp_path / "native", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_stands_where_a_checkpoint_stands(tmp_path):
    "load_into a model, through hub.source into one with its rows in another order, and a rank's part of a tensor"
    model = noisy(BASE)
    to_hf(model, None, tmp_path / "hf")
    source, plain = HFCheckpoint(tmp_path / "hf"), Transformer(BASE)
    load_into(gather_state(plain), source)  # type: ignore[arg-type]
    assert same(plain, model)
    wanted = Transformer(replace(BASE, qk_interleaved=True))
    load_into(gather_state(wanted), Weights(source, source.config, wanted.cfg))  # type: ignore[arg-type]
    ids = torch.arange(20)
    with torch.no_grad():
        assert torch.allclose(wanted(ids), model(ids), atol=1e-4, rtol=1e-5)
    part = torch.zeros(7)
    source.read_into("model.blocks.0.feed_forward.w2.weight", Chunk(part, (32, 64), start=100))
    assert torch.equal(part, model.blocks[0].feed_forward.w2.weight.flatten()[100:107])
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.nothing'"):
        source.read("model.nothing")
    with pytest.raises(CheckpointError, match=r"model\.head\.norm\.weight: has shape"):
        source.read_into("model.head.norm.weight", torch.zeros(31))
    with pytest.raises(CheckpointError, match="pass cast=True"):
        source.read_into("model.head.norm.weight", torch.zeros(32).half())


MEASURE = """
    import os, resource, sys, torch
    from internlm_nb.hub.huggingface import hf_to_native, native_to_hf
    torch.set_num_threads(1)
    src, dst, how, shard = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
    torch.ones(8, 8).to(torch.bfloat16) @ torch.ones(8, 8).to(torch.bfloat16)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
    before = peak()
    (hf_to_native if how == "in" else native_to_hf)(src, dst, shard_bytes=shard)
    print(peak() - before)
"""


def test_large_models_need_two_shards_of_memory(tmp_path):
    "Both streaming converters stay within twice a shard, however large the model"
    cfg = replace(
        BASE, vocab_size=4096, hidden_size=768, num_layers=8, num_heads=16, num_kv_heads=4, intermediate_size=3072
    )  # 290 MB in float32
    shard = 32 << 20
    model = allocate(Transformer(cfg, device="meta"), "cpu")
    for p in model.parameters():
        p.data.fill_(0.5)
    to_hf(model, None, tmp_path / "hf", shard_bytes=shard)
    total = sum(p.numel() * 4 for p in model.parameters())
    del model
    assert total > 7 * shard
    for src, dst, how in (("hf", "native", "in"), ("native", "out", "out")):
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(MEASURE),
            str(tmp_path / src),
            str(tmp_path / dst),
            how,
            str(shard),
        ]
        used = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{how}: {used / 1e6:.0f} MB above the start, model {total / 1e6:.0f} MB, shard {shard / 1e6:.0f} MB")
        assert used < 2 * shard
        shutil.rmtree(tmp_path / src)

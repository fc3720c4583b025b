"Checkpoints of the older system: a second writer, made from the table in the documents alone, agrees with ours bit for bit in both directions; what does not fit is refused by name"

import math
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.apps.convert import main
from internlm_nb.checkpoint.durable import CheckpointError
from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.hub.internevo import from_internevo, internevo_to_native, native_to_internevo, to_internevo
from internlm_nb.hub.native import native_config
from internlm_nb.hub.source import open_weights
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.transformer import Transformer

LAW = settings(deadline=None, derandomize=True, max_examples=30)


# ---- the second writer: heads are kept apart, nothing is fused, and nothing of the library is used


@dataclass(frozen=True)
class Shape:
    "A model to draw: all sizes small, all divisible by tp"

    family: str = "internlm2"
    kv: int = 2
    group: int = 2
    head_dim: int = 4
    layers: int = 3
    ffn: int = 40
    vocab: int = 24
    bias: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def heads(self):
        return self.kv * self.group

    @property
    def hidden(self):
        return self.heads * self.head_dim


def noise(gen, dtype, *shape):
    "Random bits: NaNs, infinities and -0.0 among them"
    return (
        torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=gen, dtype=torch.uint8)
        .view(dtype)
        .view(shape)
    )


def normal(gen, dtype, *shape):
    "Weights that a model can compute with"
    return (torch.randn(shape, generator=gen, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)


def draw_weights(s, seed=0, fill=noise):
    "One tensor for each head"
    gen = torch.Generator().manual_seed(seed)
    h, d = s.hidden, s.head_dim

    def make(*shape):
        return fill(gen, s.dtype, *shape)

    def heads(n):
        return [make(d, h) for _ in range(n)], [make(d) for _ in range(n)]

    blocks = []
    for _ in range(s.layers):
        q, k, v = heads(s.heads), heads(s.kv), heads(s.kv)
        o = [make(h, d) for _ in range(s.heads)]
        blocks.append(
            dict(
                q=q,
                k=k,
                v=v,
                o=o,
                o_bias=make(h),
                gate=make(s.ffn, h),
                up=make(s.ffn, h),
                down=make(h, s.ffn),
                n1=make(h),
                n2=make(h),
            )
        )
    return dict(embedding=make(s.vocab, h), blocks=blocks, norm=make(h), head=make(s.vocab, h))


def part_of(x, dim, t, tp):
    "The t-th of tp equal pieces"
    return x.chunk(tp, dim)[t].clone()


def attention_in(s, block, which, t, tp):
    "What rank t holds of the input projections (which = 0) or of their biases (1), by the name's last parts"
    q, k, v = (block[x][which] for x in "qkv")
    mine_q = q[t * s.heads // tp : (t + 1) * s.heads // tp]
    mine_k, mine_v = (x[t * s.kv // tp : (t + 1) * s.kv // tp] for x in (k, v))
    if s.family == "internlm":
        return {"mixer.Wqkv": torch.cat([*mine_q, *mine_k, *mine_v])}
    if s.family == "llama":
        return {"attention.wq": torch.cat(mine_q), "attention.wk": torch.cat(mine_k), "attention.wv": torch.cat(mine_v)}
    rows = []
    for g in range(s.kv // tp):
        rows += [*mine_q[g * s.group : (g + 1) * s.group], mine_k[g], mine_v[g]]
    return {"attention.wqkv": torch.cat(rows)}


def stage_counts(layers, pp):
    "Layers of each stage: the last ones have one more where they do not divide"
    return [layers // pp + (1 if p >= pp - layers % pp else 0) for p in range(pp)]


def shard(s, w, t, p, tp, pp, ffn_order, embed_dim, old_name):
    "One file's content"
    v1 = s.family == "internlm"
    counts = stage_counts(s.layers, pp)
    out = {}
    if p == 0:
        name = ("embedding" if v1 else "tok_embeddings") + (".word_embeddings" if old_name else "")
        out[f"{name}.weight"] = part_of(w["embedding"], embed_dim, t, tp)
    for i in range(counts[p]):
        block, at = w["blocks"][sum(counts[:p]) + i], f"{'blocks' if v1 else 'layers'}.{i}."
        out[at + ("norm1" if v1 else "attention_norm") + ".weight"] = block["n1"].clone()
        for name, x in attention_in(s, block, 0, t, tp).items():
            out[f"{at}{name}.weight"] = x
        wo = at + ("mixer.out_proj" if v1 else "attention.wo")
        out[wo + ".weight"] = torch.cat(block["o"][t * s.heads // tp : (t + 1) * s.heads // tp], dim=1)
        if s.bias:
            for name, x in attention_in(s, block, 1, t, tp).items():
                out[f"{at}{name}.bias"] = x
            if t == 0:
                out[wo + ".bias"] = block["o_bias"].clone()
        out[at + ("norm2" if v1 else "ffn_norm") + ".weight"] = block["n2"].clone()
        up, down = ("w2", "w3") if ffn_order == "old" else ("w3", "w2")
        for name, x, dim in (("w1", block["gate"], 0), (up, block["up"], 0), (down, block["down"], 1)):
            out[f"{at}{'mlp' if v1 else 'feed_forward'}.{name}.weight"] = part_of(x, dim, t, tp)
    if p == pp - 1:
        out["norm.weight"] = w["norm"].clone()
        out[("head" if v1 else "output") + ".weight"] = part_of(w["head"], 0, t, tp)
    return out


def section(s, adapt_hf=True, **more):
    "The model section, with the entries that a configuration file has"
    out = dict(
        num_chunks=1, checkpoint=False, dtype=str(s.dtype), embed_split_hidden=True, num_layers=s.layers, hidden_size=s.hidden, vocab_size=s.vocab, embed_grad_scale=1,
        parallel_output=True, num_attention_heads=s.heads, mlp_ratio=s.ffn / s.hidden, multiple_of=1, norm_type="rmsnorm", apply_post_layer_norm=False, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    if s.family != "internlm":
        out |= dict(num_kv_attention_heads=s.kv, no_bias=not s.bias, adapt_hf=adapt_hf, rope_base=1000000)
    return out | more


def write(folder, s, w, tp=1, pp=1, ffn_order="new", embed_dim=1, old_name=False, step=7, **more):
    "A whole checkpoint folder"
    folder.mkdir(parents=True)
    for p in range(pp):
        for t in range(tp):
            torch.save(shard(s, w, t, p, tp, pp, ffn_order, embed_dim, old_name), folder / f"model_tp{t}_pp{p}.pt")
    torch.save(section(s, **more), folder / "model_config.pt")
    torch.save(
        dict(
            batch_count=step,
            num_consumed_samples_in_epoch=3,
            num_consumed_tokens=4096 * step,
            inf_nan_skip_batches=1,
            step_count=step,
        ),
        folder / "context.pt",
    )
    torch.save({"step": step}, folder / f"{step}.step")
    return folder


def ours(s, w):
    "The parameters of our model, by name"
    out = {"embedding.weight": w["embedding"], "head.norm.weight": w["norm"], "head.weight": w["head"]}
    for i, b in enumerate(w["blocks"]):
        at = f"blocks.{i}."
        for which, name in ((0, "weight"), (1, "bias")) if s.bias else ((0, "weight"),):
            out[f"{at}attention.wqkv.{name}"] = torch.cat(
                [
                    x
                    for g in range(s.kv)
                    for x in (*b["q"][which][g * s.group : (g + 1) * s.group], b["k"][which][g], b["v"][which][g])
                ]
            )
        out |= {
            at + "attention.wo.weight": torch.cat(b["o"], 1),
            at + "attention_norm.weight": b["n1"],
            at + "ffn_norm.weight": b["n2"],
        }
        out |= {
            f"{at}feed_forward.w1.weight": b["gate"],
            f"{at}feed_forward.w2.weight": b["down"],
            f"{at}feed_forward.w3.weight": b["up"],
        }
        if s.bias:
            out[at + "attention.wo.bias"] = b["o_bias"]
    return out


def bits(x):
    "Type, shape and bytes"
    return x.dtype, tuple(x.shape), x.detach().contiguous().view(torch.uint8).numpy().tobytes()


def same(a, b):
    "Two dictionaries of tensors, bit for bit, names included"
    assert a.keys() == b.keys()
    assert [name for name in a if bits(a[name]) != bits(b[name])] == []


def files(folder):
    "Tensors of each shard, by file"
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("model_tp*.pt"))}


@st.composite
def cases(draw):
    "A model, and two ways to cut it"
    family = draw(st.sampled_from(["internlm", "internlm2", "llama"]))
    kv = draw(st.sampled_from([1, 2, 4]))
    s = Shape(
        family, kv, 1 if family == "internlm" else draw(st.integers(1, 3)), draw(st.sampled_from([4, 8])), draw(st.integers(1, 4)), 4 * draw(st.integers(1, 24)), 4 * draw(st.integers(1, 9)),
        draw(st.booleans()), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])),
    )  # fmt: skip
    cuts = st.tuples(
        st.sampled_from([n for n in (1, 2, 4) if kv % n == 0]),
        st.integers(1, s.layers),
        st.sampled_from([0, 1]),
        st.sampled_from(["new", "old"] if family == "internlm" else ["new"]),
    )
    return s, draw(cuts), draw(cuts), draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 2**20))


@LAW
@given(cases())
def test_any_cut_comes_in_and_goes_out_as_any_other(case):
    "In: our parameters are the drawn heads. Out: our files are those of the second writer, tensor for tensor. On the way through native weights too"
    s, (tp, pp, dim, order), (tp2, pp2, dim2, order2), old_name, adapt_hf, seed = case
    w = draw_weights(s, seed)
    adapt = dict(adapt_hf=adapt_hf) if s.family != "internlm" else {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write(place / "7", s, w, tp, pp, order, dim, old_name, **adapt)
        model = from_internevo(place / "7", ffn_order=order)
        assert model.cfg.family == s.family and model.cfg.qk_interleaved == (s.family != "internlm" and not adapt_hf)
        same(dict(model.named_parameters()), ours(s, w))

        wanted = files(write(place / "wanted", s, w, tp2, pp2, order2, dim2))
        to_internevo(model, place / "70", tp2, pp2, order2, embed_split_hidden=dim2 == 1)
        internevo_to_native(place / "7", place / "native", order, shard_bytes=1 + seed % 5000)
        native = Checkpoint(place / "native")
        same({n.removeprefix("model."): native.read(n) for n in native.names}, ours(s, w))
        native_to_internevo(place / "native", place / "8", tp2, pp2, order2, embed_split_hidden=dim2 == 1)
        for out, step in (("70", 70), ("8", 7)):
            found = files(place / out)
            assert found.keys() == wanted.keys() and (place / out / f"{step}.step").is_file()
            for file in wanted:
                same(found[file], wanted[file])
        assert native_config(native) == model.cfg
        context = torch.load(place / "8" / "context.pt", weights_only=True)
        assert context == torch.load(place / "7" / "context.pt", weights_only=True)  # the counters travel along
        again = from_internevo(place / "8", ffn_order=order2)
        assert (
            again.cfg == replace(model.cfg, mlp_ratio=again.cfg.mlp_ratio, multiple_of=again.cfg.multiple_of)
            and again.cfg.ffn_size == s.ffn
        )


def llama(s, w, base, adapt_hf):
    "transformers' Llama with the drawn heads; q and k split in halves"
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = LlamaConfig(
        hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv, vocab_size=s.vocab,
        attention_bias=s.bias, rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=False, rope_theta=base, rope_parameters={"rope_type": "default", "rope_theta": base},
        attn_implementation="eager",
    )  # fmt: skip
    half = (lambda x: x) if adapt_hf else (lambda x: torch.cat([x[0::2], x[1::2]]))
    state = {"model.embed_tokens.weight": w["embedding"], "model.norm.weight": w["norm"], "lm_head.weight": w["head"]}
    for i, b in enumerate(w["blocks"]):
        at = f"model.layers.{i}."
        for x, name in zip("qkv", ("q_proj", "k_proj", "v_proj")):
            for which, kind in ((0, "weight"), (1, "bias")) if s.bias else ((0, "weight"),):
                state[f"{at}self_attn.{name}.{kind}"] = torch.cat(
                    [half(head) if x != "v" else head for head in b[x][which]]
                )
        state[f"{at}self_attn.o_proj.weight"] = torch.cat(b["o"], 1)
        if s.bias:
            state[f"{at}self_attn.o_proj.bias"] = b["o_bias"]
        state |= {
            f"{at}mlp.gate_proj.weight": b["gate"],
            f"{at}mlp.up_proj.weight": b["up"],
            f"{at}mlp.down_proj.weight": b["down"],
        }
        state |= {f"{at}input_layernorm.weight": b["n1"], f"{at}post_attention_layernorm.weight": b["n2"]}
    model = LlamaForCausalLM(cfg)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize(
    "family,bias,adapt_hf,order",
    [
        ("internlm", True, True, "new"),
        ("internlm", True, True, "old"),
        ("internlm2", False, True, "new"),
        ("internlm2", False, False, "new"),
        ("internlm2", True, False, "new"),
        ("llama", False, True, "new"),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, family, bias, adapt_hf, order):
    "fp32; the bound is some twenty roundings of logits of size about 1"
    s = Shape(family, 4, 1 if family == "internlm" else 2, 8, 3, 96, 48, bias)
    w = draw_weights(s, 3, normal)
    for block in w["blocks"]:
        block["n1"] += 1
        block["n2"] += 1
    w["norm"] += 1
    adapt = dict(adapt_hf=adapt_hf) if family != "internlm" else {}
    model = from_internevo(write(tmp_path / "7", s, w, 2, 2, order, **adapt), ffn_order=order)
    ids = torch.arange(40) * 7 % s.vocab
    with torch.no_grad():
        theirs = llama(s, w, 1e4 if family == "internlm" else 1e6, adapt_hf)(ids[None]).logits[0]
        mine = model(ids)
    scale = float(theirs.abs().max())
    assert 0.3 < scale < 30
    assert float((mine - theirs).abs().max()) < 3e-6 * scale


# ---- refusals


S1 = Shape("internlm", 4, 1, 4, 3, 40, 24, bias=True)
S2 = Shape("internlm2", 2, 2, 4, 3, 40, 24)


def edit(path, change):
    "Change a file's dictionary"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def refused(folder, **options):
    "The message with which a folder is refused, by both readers; the native folder does not appear"
    told = []
    for read in (from_internevo, lambda f, **o: internevo_to_native(f, folder.with_name("native"), **o)):
        with pytest.raises(CheckpointError) as caught:
            read(folder, **options)
        told.append(str(caught.value))
    assert told[0] == told[1] and [p.name for p in folder.parent.iterdir() if "native" in p.name] == []
    return told[0]


def test_each_fault_of_a_shard_is_named(tmp_path):
    folder = write(tmp_path / "7", S1, draw_weights(S1), 2, 2)
    path = folder / "model_tp1_pp1.pt"
    good = path.read_bytes()
    cases = [
        (lambda c: c.pop("blocks.1.mlp.w2.weight"), "model_tp1_pp1.pt: blocks.1.mlp.w2.weight is missing"),
        (lambda c: c.pop("blocks.0.mixer.Wqkv.bias"), "model_tp1_pp1.pt: blocks.0.mixer.Wqkv.bias is missing"),
        (lambda c: c.pop("head.weight"), "head.weight is missing"),
        (lambda c: c.update({"blocks.0.mlp.w4.weight": torch.ones(2)}), "blocks.0.mlp.w4.weight (2,) has no place"),
        (lambda c: c.update({"embedding.weight": torch.ones(24, 8)}), "embedding.weight (24, 8) has no place"),
        (
            lambda c: c.update({"blocks.0.mlp.w1.weight": torch.ones(19, 16)}),
            "blocks.0.mlp.w1.weight: the ranks hold (20, 16), (19, 16); they should make up (40, 16), cut on dim 0",
        ),
        (
            lambda c: c.update({"blocks.1.mixer.Wqkv.weight": torch.ones(23, 16)}),
            "blocks.1.mixer.Wqkv.weight: the ranks hold (24, 16), (23, 16)",
        ),
        (
            lambda c: c.update({"blocks.1.mixer.out_proj.weight": torch.ones(16, 7)}),
            "blocks.1.mixer.out_proj.weight: the ranks hold (16, 8), (16, 7)",
        ),
        (
            lambda c: c.update({"norm.weight": torch.ones(15)}),
            "norm.weight: the ranks hold (16,), (15,); they should make up (16,), the same in each",
        ),
        (
            lambda c: c.update({"blocks.0.norm1.weight": torch.ones(16, dtype=torch.bfloat16)}),
            "blocks.0.norm1.weight: of different types, torch.bfloat16, torch.float32",
        ),
        (lambda c: c.update({"blocks.0.norm1.weight": [1, 2]}), "blocks.0.norm1.weight (list): not a tensor"),
        (lambda c: [c.pop(n) for n in list(c) if n.startswith("blocks.1.")], "blocks.1.mixer.Wqkv.weight is missing"),
    ]
    for change, told in cases:
        edit(path, change)
        assert told in refused(folder)
        path.write_bytes(good)
    from_internevo(folder)

    rank0 = folder / "model_tp0_pp0.pt"  # holds the only bias of the output projection
    kept = rank0.read_bytes()
    edit(rank0, lambda c: c.pop("blocks.0.mixer.out_proj.bias"))
    assert "blocks.0.mixer.out_proj.bias is missing" in refused(folder)
    rank0.write_bytes(kept)
    edit(
        folder / "model_tp1_pp0.pt",
        lambda c: c.update(
            {
                "blocks.0.mixer.out_proj.bias": torch.full((16,), 9.0),
                "blocks.0.mixer.rotary_emb.inv_freq": torch.ones(2),
            }
        ),
    )
    bias = dict(from_internevo(folder).named_parameters())["blocks.0.attention.wo.bias"]
    assert torch.equal(
        bias, torch.load(rank0, weights_only=True)["blocks.0.mixer.out_proj.bias"]
    )  # another rank's is not looked at


def test_a_whole_file_or_rank_that_is_missing(tmp_path):
    s, w = S2, draw_weights(S2)
    for i, (gone, told) in enumerate(
        (("model_tp0_pp1.pt", "model_tp0_pp1.pt missing"), ("model_tp1_pp0.pt", "model_tp1_pp0.pt missing"))
    ):
        folder = write(tmp_path / str(i) / "7", s, w, 2, 2)
        (folder / gone).unlink()
        assert told in refused(folder)
    for i, pattern in enumerate(("model_tp1_*", "model_*_pp1.pt")):  # a whole rank, a whole stage
        folder = write(tmp_path / f"all{i}" / "7", s, w, 2, 2)
        for path in folder.glob(pattern):
            path.unlink()
        told = refused(folder)
        assert (
            "tok_embeddings.weight: the ranks hold (24, 8); they should make up (24, 16)"
            if i == 0
            else "stages have 1 blocks, but num_layers is 3"
        ) in told
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no model_tp0_pp0.pt" in refused(tmp_path / "empty")


def test_the_wrong_feed_forward_order(tmp_path):
    w = draw_weights(S1)
    for order, wrong in (("new", "old"), ("old", "new")):
        folder = write(tmp_path / order / "7", S1, w, 2, 1, order)
        told = refused(folder, ffn_order=wrong)
        assert (
            "blocks.0.mlp.w2.weight" in told
            and "blocks.2.mlp.w3.weight" in told
            and f"ask for ffn_order {order}" in told
        )
        same(dict(from_internevo(folder, ffn_order=order).named_parameters()), ours(S1, w))
    with pytest.raises(ValueError, match="only internlm ever had"):
        from_internevo(write(tmp_path / "v2" / "7", S2, draw_weights(S2)), ffn_order="old")
    with pytest.raises(ValueError, match="ffn_order is 'odl'"):
        from_internevo(folder, ffn_order="odl")  # type: ignore[arg-type]


def test_an_unfinished_save(tmp_path):
    folder = write(tmp_path / "7", S2, draw_weights(S2))
    (folder / "7.step").unlink()
    assert "has no STEP.step file" in refused(folder)
    assert main(["from-internevo", str(folder), str(tmp_path / "x")]) == 2 and not (tmp_path / "x").exists()
    assert main(["from-internevo", str(folder), str(tmp_path / "x"), "--allow-incomplete"]) == 0
    same(dict(from_internevo(folder, allow_incomplete=True).named_parameters()), ours(S2, draw_weights(S2)))


class Trap:
    "Runs a command when it is unpickled by a reader that runs what it reads"

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["model_tp0_pp0.pt", "model_config.pt", "context.pt"])
def test_code_in_a_file_is_not_run(tmp_path, name):
    folder = write(tmp_path / "7", S2, draw_weights(S2))
    mark = tmp_path / "it_ran"
    torch.save({"tok_embeddings.weight": Trap(mark), "step_count": 7}, folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: holds more than tensors and plain values"):
        internevo_to_native(folder, tmp_path / "native")
    assert not mark.exists() and not (tmp_path / "native").exists()
    torch.load(folder / name, weights_only=False)  # the trap is one
    assert mark.exists()


def test_damaged_files(tmp_path):
    folder = write(tmp_path / "7", S2, draw_weights(S2), 2)
    path = folder / "model_tp1_pp0.pt"
    good = path.read_bytes()
    for bad in (b"", b"no zip", good[: len(good) // 2], pickle.dumps({"norm.weight": 1})):
        path.write_bytes(bad)
        assert "model_tp1_pp0.pt: cannot be read" in refused(folder)
    torch.save([torch.ones(2)], path)
    assert "model_tp1_pp0.pt: holds list, not tensors by name" in refused(folder)


def test_the_model_section(tmp_path):
    folder = write(tmp_path / "7", S2, draw_weights(S2))
    cases = [
        (dict(num_chunks=2), "num_chunks is 2, and only 1"), (dict(num_experts=4), "num_experts is 4"), (dict(norm_type="layernorm"), "norm_type is 'layernorm'"),
        (dict(use_swiglu=False), "use_swiglu is False"), (dict(window=4), "unknown window"), (dict(num_layers=4), "stages have 3 blocks, but num_layers is 4"),
        (dict(hidden_size=None), "hidden_size is missing"), (dict(num_kv_attention_heads=3), "num_kv_heads 3 does not divide num_heads 4"), (dict(mlp_ratio="wide"), "could not convert"),
        (dict(vocab_size=25), "tok_embeddings.weight: the ranks hold (24, 16); they should make up (25, 16)"), (dict(no_bias=False), "layers.0.attention.wqkv.bias is missing"),
        (dict(num_kv_attention_heads=1), "layers.0.attention.wqkv.weight"), (dict(model_type="INTERNLM"), "names of internlm2"), (dict(multiple_of=7), "feed_forward.w1.weight"),
    ]  # fmt: skip
    for entries, told in cases:
        torch.save({**section(S2), **entries}, folder / "model_config.pt")
        assert told in refused(folder), told
    torch.save(
        section(S2)
        | {
            "use_dynamic_ntk_rope": True,
            "max_position_embeddings": 128,
            "norm_head": True,
            "adapt_hf": False,
            "drop_rate": 0,
            "use_flash_attn": True,
        },
        folder / "model_config.pt",
    )
    cfg = from_internevo(folder).cfg
    assert (cfg.rope_scaling, cfg.max_position_embeddings, cfg.norm_head, cfg.qk_interleaved) == (
        "dynamic",
        128,
        True,
        True,
    )
    (folder / "model_config.pt").unlink()
    assert "model_config.pt: missing" in refused(folder)
    assert from_internevo(folder, config=cfg).cfg == cfg


def test_a_settings_class_of_the_older_system_is_read_as_a_dictionary(tmp_path):
    "Written in another process, where the class exists; here it does not"
    folder = write(tmp_path / "7", S2, draw_weights(S2))
    code = """
import sys, types, torch
for name in ("internlm", "internlm.core", "internlm.core.context", "internlm.core.context.parallel_context"):
    sys.modules[name] = types.ModuleType(name)
class Config(dict): pass
Config.__module__, Config.__qualname__ = "internlm.core.context.parallel_context", "Config"
sys.modules[Config.__module__].Config = Config
path = sys.argv[1]
torch.save(Config(torch.load(path, weights_only=True) | {"dtype": torch.bfloat16}), path)
"""
    subprocess.run([sys.executable, "-c", code, str(folder / "model_config.pt")], check=True)
    assert "internlm.core" in (folder / "model_config.pt").read_bytes().decode("latin1")
    same(dict(from_internevo(folder).named_parameters()), ours(S2, draw_weights(S2)))


# ---- writing


def tiny(**more):
    "A model of ours"
    return Transformer(
        ModelConfig(
            **(
                dict(
                    family="internlm2",
                    vocab_size=24,
                    hidden_size=16,
                    num_layers=3,
                    num_heads=4,
                    num_kv_heads=2,
                    mlp_ratio=2.5,
                    multiple_of=8,
                )
                | more
            )
        )
    )


def test_what_has_no_word_there_is_refused(tmp_path):
    for more, told in (
        (dict(tie_embeddings=True), "tie_embeddings"), (dict(rope_scaling="linear", rope_factor=2.0), "rope_scaling linear"), (dict(head_dim_override=8), "head_dim_override 8"),
        (dict(qkv_bias=True), "qkv_bias True with out_bias False"), (dict(family="internlm3"), "family internlm3"), (dict(family="internlm"), "num_kv_heads 2"),
        (dict(family="internlm", num_kv_heads=4, qk_interleaved=True), "qk_interleaved"), (dict(family="internlm", num_kv_heads=4, norm_head=True), "norm_head"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            to_internevo(tiny(**more), tmp_path / "7")
    for cut, told in (
        (dict(tp=4), "tp 4 does not divide num_kv_heads 2"),
        (dict(tp=0), "tp is 0"),
        (dict(pp=4), "pp is 4, but there are 3 layers"),
        (dict(pp=0), "pp is 0"),
    ):
        with pytest.raises(ValueError, match=told):
            to_internevo(tiny(), tmp_path / "7", **cut)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_complete_or_absent_and_never_replaced(tmp_path, monkeypatch):
    model, real = tiny(), torch.save
    for fail_at in range(7):  # 2 x 2 shards, section, context, step
        calls = []

        def failing(*args, fail_at=fail_at, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) > fail_at:
                raise OSError(28, "No space left on device")
            real(*args, **kwargs)

        monkeypatch.setattr(torch, "save", failing)
        with pytest.raises(CheckpointError, match="No space left"):
            to_internevo(model, tmp_path / "7", 2, 2)
        assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    written = []
    monkeypatch.setattr(
        torch, "save", lambda content, file: (written.append(Path(file.name).name), real(content, file))
    )
    to_internevo(model, tmp_path / "7", 2, 2)
    assert written[-1] == "7.step" and [p.name for p in tmp_path.iterdir()] == ["7"]
    before = {p.name: p.read_bytes() for p in (tmp_path / "7").iterdir()}
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        to_internevo(model, tmp_path / "7")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "7").iterdir()}


def test_native_weights_that_do_not_fit_their_config(tmp_path):
    from dataclasses import asdict

    from internlm_nb.checkpoint.logical import gather_state, save_state

    state = gather_state(tiny())
    for i, (change, told) in enumerate(
        (
            (lambda s: s.pop("model.blocks.1.feed_forward.w2.weight"), "blocks.1.feed_forward.w2.weight is missing"),
            (lambda s: s.update({"model.x": torch.ones(1)}), "model.x has no place"),
            (lambda s: s.update({"model.head.weight": torch.ones(24, 8)}), "model.head.weight has shape"),
        )
    ):
        bad = dict(state)
        change(bad)
        save_state(tmp_path / f"bad{i}", bad, {"model": asdict(tiny().cfg)})
        with pytest.raises(CheckpointError, match=told):
            native_to_internevo(tmp_path / f"bad{i}", tmp_path / "7")
    assert not (tmp_path / "7").exists()


# ---- memory


MEASURE = """
import sys
from pathlib import Path
from internlm_nb.hub.internevo import internevo_to_native, native_to_internevo

def field(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

command, src, dst, options = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4])
{"in": internevo_to_native, "out": native_to_internevo}[command](sys.argv[5], dst + ".warm")  # lazy imports and pools
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = field("VmRSS")
{"in": internevo_to_native, "out": native_to_internevo}[command](src, dst, **options)
print(field("VmHWM") - before)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory cannot be reset here"
)
def test_memory_stays_within_twice_a_shard(tmp_path):
    "Mapped pages of the files counted. The model is four times one shard, so a whole model in memory would be seen"
    s = Shape("internlm2", 4, 1, 64, 16, 8192, 2048)
    assert s.hidden == 256
    gen = torch.Generator().manual_seed(0)
    w = draw_weights(s, fill=lambda gen, dtype, *shape: torch.empty(shape, dtype=dtype))
    del gen
    src = write(tmp_path / "7", s, w, 2, 2)
    small = write(tmp_path / "1", S2, draw_weights(S2))
    internevo_to_native(small, tmp_path / "small")
    one = max(p.stat().st_size for p in src.glob("model_*"))
    assert 100e6 < sum(p.stat().st_size for p in src.glob("model_*")) > 3.9 * one

    def peak(command, a, b, options, warm):
        out = subprocess.run(
            [sys.executable, "-c", MEASURE, command, str(a), str(b), repr(options), str(warm)],
            capture_output=True,
            text=True,
            env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"},
        )
        assert out.returncode == 0, out.stderr
        return int(out.stdout)

    grown = peak("in", src, tmp_path / "native", {}, small)
    assert grown < 2.2 * one, f"{grown / one:.2f} shards"  # a tensor and the interpreter's own growth beside it
    grown = peak("out", tmp_path / "native", tmp_path / "70", dict(tp=2, pp=2), tmp_path / "small")
    assert grown < 2.2 * one, f"{grown / one:.2f} shards"


# ---- one reader for all


@settings(deadline=None, derandomize=True, max_examples=8)
@given(cases())
def test_a_model_with_either_order_of_pairs_is_filled_from_any_folder(case):
    "Weights that are read for a model with the other pairs are moved: logits stay, to the rounding of sums in another order"
    s, (tp, pp, dim, _), _, _, adapt_hf, seed = case
    s = replace(s, dtype=torch.float64, family="internlm2", bias=False)
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name) / "7", s, draw_weights(s, seed, normal), tp, pp, "new", dim, adapt_hf=adapt_hf)
        model = from_internevo(folder)
        other = Transformer(replace(model.cfg, qk_interleaved=adapt_hf), dtype=torch.float64)
        weights = open_weights(folder, other.cfg)
        for key, p in other.named_parameters():
            weights.read_into(f"model.{key}", p)
        ids = torch.arange(17) % s.vocab
        with torch.no_grad():
            a, b = model(ids), other(ids)
        assert float((a - b).abs().max()) <= 1e-12 * float(a.abs().max())
        same(
            dict(
                zip(
                    (n for n, _ in model.named_parameters()),
                    (open_weights(folder).read(f"model.{n}") for n, _ in model.named_parameters()),
                )
            ),
            dict(model.named_parameters()),
        )


def test_a_run_starts_from_any_kind_of_folder(tmp_path):
    "--checkpoint.init: the same weights whoever wrote them, and the pairs as the run's model has them"
    from train_runs import TINY, tiny_run, trainer, with_fields

    from internlm_nb.hub.huggingface import to_hf

    run = tiny_run(train_steps=1, checkpoint_every=0)
    model = Transformer(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    to_internevo(model, tmp_path / "50", pp=2)  # 97 words cannot be cut
    internevo_to_native(tmp_path / "50", tmp_path / "native")
    to_hf(model, None, tmp_path / "hf")
    said: list[str] = []
    for name in ("50", "native", "hf"):
        started = trainer(with_fields(run, checkpoint_init=str(tmp_path / name)), tmp_path / f"run_{name}", said)
        assert started.state.step == 0 and any(line.startswith("weights from") and line.endswith(name) for line in said)
        same(dict(started.model.named_parameters()), dict(model.named_parameters()))
    ids = torch.arange(30)
    turned = replace(
        run,
        model=replace(TINY, qk_interleaved=True, rope_base=2e4),
        checkpoint=replace(run.checkpoint, init=str(tmp_path / "50")),
    )
    other = trainer(turned, tmp_path / "turned", said)
    assert any("rope_base is 10000.0" in line and "20000.0 here" in line for line in said)
    same(
        {n: p for n, p in other.model.named_parameters() if "wqkv" not in n},
        {n: p for n, p in model.named_parameters() if "wqkv" not in n},
    )
    back = Transformer(replace(turned.model, rope_base=TINY.rope_base))
    back.load_state_dict(other.model.state_dict())
    with torch.no_grad():
        wanted, found = model(ids), back(ids)
    assert float((wanted - found).abs().max()) < 3e-6 * float(
        wanted.abs().max()
    )  # sums of scores in another order, fp32
    with pytest.raises(CheckpointError, match="num_heads is 4 there, and 8 is asked for"):
        trainer(replace(turned, model=replace(TINY, num_heads=8, num_kv_heads=4)), tmp_path / "heads")


def test_a_folder_without_a_step_is_named_by_its_folder(tmp_path):
    from dataclasses import asdict

    from internlm_nb.checkpoint.logical import gather_state, save_state

    save_state(tmp_path / "native", gather_state(tiny()), {"model": asdict(tiny().cfg)})
    native_to_internevo(tmp_path / "native", tmp_path / "500")
    save_state(
        tmp_path / "run",
        gather_state(tiny()),
        {"step": 30, "model": asdict(tiny().cfg), "train": {"num_consumed_tokens": 99}},
    )
    native_to_internevo(tmp_path / "run", tmp_path / "600")
    assert (tmp_path / "500" / "500.step").is_file() and (tmp_path / "600" / "30.step").is_file()
    context = torch.load(tmp_path / "600" / "context.pt", weights_only=True)
    assert context == dict(
        batch_count=30, num_consumed_samples_in_epoch=0, num_consumed_tokens=99, inf_nan_skip_batches=0, step_count=30
    )

"""Exported folders in another version of transformers, in an environment of its own. Run with: pytest -m slow tests/test_hub_versions.py

The older version is installed once, beside this environment, into pytest's cache.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internlm_nb.data.chat import chat_text
from internlm_nb.data.corpus import corpus
from internlm_nb.data.tokenizer import train_tokenizer
from internlm_nb.hub.huggingface import from_hf, to_hf
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.init import normal_slice
from internlm_nb.model.transformer import Transformer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*no tokenizer is loaded")]
OLDER = "4.57"
BASE = ModelConfig(
    "internlm2",
    vocab_size=2000,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    mlp_ratio=2.0,
    multiple_of=16,
    max_position_embeddings=32,
    rope_base=1e6,
)
CASES = {
    "v1": replace(
        BASE,
        family="internlm",
        num_kv_heads=6,
        qkv_bias=True,
        out_bias=True,
        rope_base=1e4,
        rope_scaling="dynamic",
        rope_factor=2.0,
    ),
    "v2": replace(BASE, qk_interleaved=True),
    "v2-norm-head": replace(BASE, norm_head=True),
    "v2-linear": replace(BASE, rope_scaling="linear", rope_factor=4.0),
    "v3": replace(BASE, family="internlm3", rope_base=5e7, rope_scaling="dynamic", rope_factor=6.0),
    "llama-tied": replace(BASE, family="llama", tie_embeddings=True, rope_base=1e5),
    "head-dim": replace(BASE, family="llama", head_dim_override=16),
    "qkv-bias": replace(BASE, qkv_bias=True),
}
LOAD = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
place, texts, messages = sys.argv[1], json.load(open(sys.argv[1] + "/texts.json")), json.load(open(sys.argv[1] + "/messages.json"))
out = {"version": transformers.__version__, "ids": {}, "chat": {}, "decoded": {}}
for name in json.load(open(place + "/names.json")):
    folder = f"{place}/{name}"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        logits = {n: model(torch.arange(n)[None], use_cache=False).logits[0] for n in (20, 50)}
    torch.save(logits, folder + ".logits")
    model.save_pretrained(f"{folder}-{transformers.__version__}", max_shard_size="60KB")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend"), type(tokenizer)
    out["ids"][name] = tokenizer(texts)["input_ids"]
    out["decoded"][name] = [tokenizer.decode(i) for i in out["ids"][name]]
    out["chat"][name] = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
json.dump(out, open(place + "/out.json", "w"))
"""


@pytest.fixture(scope="session")
def older(request):
    "A folder with the older transformers and what it needs, to be put before this environment"
    folder = Path(request.config.cache.mkdir("internlm_nb")) / f"transformers-{OLDER}"
    if not (folder / "done").is_file():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), f"transformers=={OLDER}.*"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"transformers {OLDER} cannot be installed")
        (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    "Folders of all cases with a tokenizer, and what we compute"
    place = tmp_path_factory.mktemp("exported")
    tokenizer = train_tokenizer(
        [t for kind in corpus().values() for t in kind[:4]], place / "t.model", vocab_size=2000, character_coverage=0.98
    )
    texts = [line for kind in corpus("valid").values() for text in kind[:2] for line in text.split("\n")[:40]] + [
        "<|im_start|>a<|im_end|>",
        "  \t\n\n x",
        "",
    ]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Is 7 > 5? <b>"}]
    for name, value in (("names", list(CASES)), ("texts", texts), ("messages", messages)):
        (place / f"{name}.json").write_text(json.dumps(value))
    models = {}
    for name, cfg in CASES.items():
        model = models[name] = Transformer(cfg)
        with torch.no_grad():
            for parameter, p in model.named_parameters():
                noise = normal_slice(1, parameter, 0, p.numel(), 0.2).view(p.shape)
                p.copy_(1 + noise if parameter.endswith("norm.weight") else noise)
        to_hf(model, tokenizer, place / name, shard_bytes=100_000)
    return place, tokenizer, texts, messages, models


@pytest.mark.parametrize("which", ["older", "this"])
def test_logits_tokens_and_templates(which, exported, request):
    "Each version finds our logits, our ids and our chat text in every exported folder; and what it saves itself comes back to us with the same bits"
    place, tokenizer, texts, messages, models = exported
    paths = [str(request.getfixturevalue("older"))] if which == "older" else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LOAD, str(place)], check=True, env=environment)
    found = json.loads((place / "out.json").read_text())
    assert found["version"].startswith(OLDER) == (which == "older")
    for name, model in models.items():
        logits = torch.load(place / f"{name}.logits", weights_only=True)
        with torch.no_grad():
            for n, theirs in logits.items():
                ours = model(torch.arange(n))
                error = ((theirs - ours).abs().max() / ours.abs().max()).item()
                print(
                    f"transformers {found['version']} {name:13} {n} tokens: largest difference {error:.1e} of the largest logit"
                )
                assert error < 1e-5
        assert found["ids"][name] == [tokenizer.encode(t) for t in texts]
        assert found["decoded"][name] == texts
        assert found["chat"][name] == "<s>" + chat_text(messages, "v2")
        back, saved = from_hf(place / name)[0], from_hf(place / f"{name}-{found['version']}")[0]
        assert back.cfg == saved.cfg == replace(model.cfg, norm_head=False)
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), saved.parameters()))

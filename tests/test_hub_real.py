"""A real model, in and out: SmolLM2-135M-Instruct, made from a package of PyPI by scripts/dev/smollm2.py. Run with: pytest -m slow tests/test_hub_real.py

The folder is kept in pytest's cache. tests/local_hub.py measures perplexities on files of one's own.
"""

import importlib.util
import math
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from internlm_nb.checkpoint.logical import load_weights, save_state
from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.data.chat import chat_text
from internlm_nb.data.corpus import corpus
from internlm_nb.hub.huggingface import HFCheckpoint, from_hf, hf_to_native, native_to_hf, to_hf
from internlm_nb.model.generate import generate
from internlm_nb.model.init import allocate
from internlm_nb.model.transformer import Transformer

pytestmark = pytest.mark.slow
PROMPTS = (
    "The capital of Japan is", "Once upon a time", "def fibonacci(n):", "Water boils at", "The opposite of cold is",
    chat_text([{"role": "user", "content": "What is the capital of France?"}]),
    chat_text([{"role": "user", "content": "Write a haiku about the sea."}]),
    chat_text([{"role": "system", "content": "Answer with one word."}, {"role": "user", "content": "Which colour is the sky?"}]),
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(request):
    "SmolLM2 as a Hugging Face folder"
    script = Path(__file__).parents[1] / "scripts" / "dev" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.prepare(Path(request.config.cache.mkdir("internlm_nb")) / "smollm2")
    except (ImportError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no real model: {error}")


@pytest.fixture(scope="session")
def theirs(folder):
    "As transformers has it, in float32"
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def perplexity(logits, tokenizer, text: str, windows: int = 4, length: int = 1024) -> float:
    "exp of the mean loss over windows from the start of a text"
    ids = torch.tensor(tokenizer.encode(text, marks=False)[: windows * length]).view(windows, length)
    loss = sum(F.cross_entropy(logits(row)[:-1].float(), row[1:], reduction="sum").item() for row in ids)
    return math.exp(loss / (windows * (length - 1)))


def greedy(model, tokenizer, count: int = 24) -> list[list[int]]:
    "What our model writes"
    return generate(model, [tokenizer.encode(p) for p in PROMPTS], count)


@torch.no_grad()
def greedy_theirs(model, tokenizer, count: int = 24) -> list[list[int]]:
    "What transformers' model writes: its own generate, without its stops"
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        options = dict(
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=1.0,
        )
        out.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist())
    return out


def test_same_tokens_and_perplexity_all_the_way(folder, theirs, tmp_path):
    "Import, native save and load, export, import again: the same bits; and so the same tokens and perplexity as transformers, at both ends"
    model, tokenizer = from_hf(folder, dtype=torch.float32)
    expected = greedy_theirs(theirs, tokenizer)
    assert greedy(model, tokenizer) == expected
    assert "Tokyo" in tokenizer.decode(expected[0])
    texts = {kind: "\n".join(documents) for kind, documents in corpus("valid").items()}
    for kind, text in texts.items():
        ours, reference = (perplexity(f, tokenizer, text) for f in (model, lambda row: theirs(row[None]).logits[0]))
        print(f"{kind}: {ours:.4f}, transformers {reference:.4f}")
        assert ours == pytest.approx(reference, rel=1e-4)

    save_state(
        tmp_path / "native",
        {f"model.{n}": p.detach() for n, p in model.named_parameters()},
        {"step": 0, "model": asdict(model.cfg)},
    )
    loaded = allocate(Transformer(model.cfg, device="meta"), "cpu")
    load_weights(loaded, Checkpoint(tmp_path / "native"))
    to_hf(loaded, tokenizer, tmp_path / "out")
    back, again = from_hf(tmp_path / "out")
    assert back.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters()))
    assert [again.encode(p) for p in PROMPTS] == [tokenizer.encode(p) for p in PROMPTS]
    assert greedy(back, again) == expected

    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(exported.state_dict().values(), theirs.state_dict().values()))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(PROMPTS[0])["input_ids"] == tokenizer.encode(PROMPTS[0])


def test_from_disk_to_disk(folder, tmp_path):
    "Through the streaming converters the tensors come back bit for bit, in bfloat16 as they were, and the tokenizer goes along"
    hf_to_native(folder, tmp_path / "native", shard_bytes=64 << 20)
    native_to_hf(tmp_path / "native", tmp_path / "out", shard_bytes=64 << 20)
    before, after = HFCheckpoint(folder), HFCheckpoint(tmp_path / "out")
    assert before.names == after.names and len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert all(torch.equal(before.read(n), after.read(n)) for n in before.names)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()

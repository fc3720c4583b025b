"Folders from strangers are data: no code of theirs runs, no name leads out, and sizes are compared before memory is asked for"

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm_nb.checkpoint.durable import CheckpointError
from internlm_nb.checkpoint.logical import save_state
from internlm_nb.data.tokenizer import train_tokenizer
from internlm_nb.hub.hf_files import read_header
from internlm_nb.hub.huggingface import from_hf, to_hf
from internlm_nb.hub.internevo import from_internevo, internevo_to_native, to_internevo
from internlm_nb.hub.load import default_system, load_model
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.transformer import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer is loaded")
CFG = ModelConfig("llama", 320, 32, 2, 4, 2, 2.0, intermediate_size=48)


class Code:
    "Pickled as: make a file"

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def hf(tmp_path):
    "An exported folder with a tokenizer"
    tokenizer = train_tokenizer(["the quick brown fox"] * 60, tmp_path / "t.model", 300)
    return to_hf(Transformer(CFG), tokenizer, tmp_path / "hf")


def test_code_beside_a_model_is_never_run(hf, tmp_path):
    "auto_map, custom modules and templates are not looked at by us"
    marker = tmp_path / "ran"
    (hf / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((hf / name).read_text())
        config |= {
            "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoTokenizer": ["modeling_evil.Evil", None]},
            "trust_remote_code": True,
        }
        (hf / name).write_text(json.dumps(config))
    (hf / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}x{% endfor %}"
    )
    loaded = load_model(hf)
    assert loaded.tokenizer is not None and loaded.system is None and not marker.exists()


@pytest.mark.parametrize("where", ["bin", "shard", "section", "context"])
def test_pickles_are_refused_unread(hf, tmp_path, where):
    "Weights and settings of either kind: named, with nothing run"
    marker = tmp_path / "ran"
    if where == "bin":
        (hf / "model.safetensors").unlink()
        torch.save({"model.embed_tokens.weight": Code(marker)}, hf / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"holds more than tensors.*take a safetensors file"):
            load_model(hf)
    else:
        folder = to_internevo(Transformer(CFG), tmp_path / "7")
        name = {"shard": "model_tp0_pp0.pt", "section": "model_config.pt", "context": "context.pt"}[where]
        torch.save({"x": Code(marker)}, folder / name)
        with pytest.raises(CheckpointError, match=f"{name}: holds more than tensors"):
            load_model(folder) if where != "context" else internevo_to_native(folder, tmp_path / "n")
    assert not marker.exists()


def test_a_tensor_that_claims_more_than_its_bytes(hf, tmp_path):
    "Strides of 0 make a small file claim any shape: refused before it is copied, in both kinds of torch files"
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    name = "model.embed_tokens.weight"
    torch.save(tensors | {name: torch.zeros(1, 1).expand(320, 32)}, hf / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"{name} claims shape"):
        from_hf(hf)
    folder = to_internevo(Transformer(CFG), tmp_path / "7")
    shard = torch.load(folder / "model_tp0_pp0.pt", weights_only=True)
    torch.save(shard | {"tok_embeddings.weight": torch.zeros(1, 1).expand(320, 32)}, folder / "model_tp0_pp0.pt")
    with pytest.raises(CheckpointError, match="claims shape"):
        from_internevo(folder)


def header(path: Path, entries: object, data: bytes = bytes(64)) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"a": F32, "b": F32}, "share bytes"),
        ({"a": F32 | {"shape": [2**62]}}, "does not fit"),
        ({"a": F32 | {"shape": [-4]}}, "cannot be"),
        ({"a": F32 | {"shape": [4.0]}}, "cannot be"),
        ({"a": F32 | {"data_offsets": [56, 72]}}, "does not fit"),
        ({"a": F32 | {"dtype": ["F32"]}}, "not supported"),
        (b'{"a": ' + json.dumps(F32).encode() + b', "a": ' + json.dumps(F32).encode() + b"}", "a stands twice"),
        (b"[" * 100_000, "header is damaged"),
        (b"[]", "header is damaged"),
    ],
)
def test_headers(tmp_path, entries, words):
    with pytest.raises(CheckpointError, match=words):
        read_header(header(tmp_path / "x.safetensors", entries))


def test_a_header_that_says_it_is_huge(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="cut short"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change, field",
    [
        ({"num_hidden_layers": 9_999}, "num_hidden_layers"), ({"num_hidden_layers": 10**12}, "num_(hidden_)?layers"), ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"hidden_size": 2**40}, "hidden_size"), ({"vocab_size": 0}, "vocab_size"), ({"vocab_size": True}, "vocab_size"), ({"vocab_size": 2_000_000_000}, "embed_tokens"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads"), ({"head_dim": -8}, "head_dim"), ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"), ({"max_position_embeddings": 1e9}, "max_position_embeddings"), ({"intermediate_size": 10**400}, "config.json"),
        ({"rope_parameters": {"rope_theta": float("inf"), "rope_type": "default"}}, "rope_theta"), ({"internlm_nb": {"mlp_ratio": 1e308, "multiple_of": 1, "intermediate_size": None}}, None),
    ],
)  # fmt: skip
def test_numbers_of_a_config(hf, change, field):
    "Huge, negative and not finite: named at once, and no memory is asked for"
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if field is None:  # our own key is taken only as far as it agrees with the rest
        assert from_hf(hf)[0].cfg.ffn_size == 48
        return
    with pytest.raises((ValueError, CheckpointError), match=field):
        from_hf(hf)


def test_deep_and_large_json(hf):
    for name in ("config.json", "tokenizer_config.json"):
        old = (hf / name).read_text()
        (hf / name).write_text("[" * 200_000)
        with pytest.raises(ValueError, match=f"{name}: is nested too deeply"):
            load_model(hf)
        (hf / name).write_text(old)


def test_native_layers_are_bound_by_what_is_held(tmp_path):
    tensors = {f"model.{n}": p.detach() for n, p in Transformer(CFG).named_parameters()}
    save_state(tmp_path / "n", tensors, {"model": vars(CFG) | {"num_layers": 9_999}})
    with pytest.raises(CheckpointError, match="num_layers is 9999, but it holds"):
        load_model(tmp_path / "n")
    save_state(tmp_path / "m", tensors, {"model": vars(CFG) | {"vocab_size": 2_000_000_000}})
    with pytest.raises(CheckpointError, match="has shape"):
        load_model(tmp_path / "m")


def test_links_and_leftovers(hf, tmp_path):
    "A shard that is a link out of the folder is refused, the cache of Hugging Face is not; nor are two models in one folder guessed between"
    tensors = load_file(hf / "model.safetensors")
    names = list(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    shutil.copytree(hf, snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").unlink()
    for i, file in enumerate(files):
        save_file({n: tensors[n] for n in names[i::2]}, blobs / f"blob{i}")
        (snapshot / file).symlink_to(Path("../../blobs") / f"blob{i}")
    index = {"weight_map": {n: files[k % 2] for k, n in enumerate(names)}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    want = from_hf(hf)[0]
    assert all(torch.equal(a, b) for a, b in zip(from_hf(snapshot)[0].parameters(), want.parameters()))
    other = tmp_path / "other"
    shutil.copytree(snapshot, other, symlinks=True)
    for i, file in enumerate(files):
        (other / file).unlink()
        (other / file).symlink_to(blobs / f"blob{i}")
    with pytest.raises(CheckpointError, match="a link that leads out of its folder"):
        from_hf(other)
    for file in files:
        shutil.copyfile(snapshot / file, hf / file)
    shutil.copyfile(snapshot / "model.safetensors.index.json", hf / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"model\.safetensors, and model\.safetensors\.index\.json.*left over"):
        from_hf(hf)


@pytest.mark.parametrize(
    "name, words",
    [
        ("consolidated.00.pth", "Meta's own"),
        ("model.gguf", "llama.cpp"),
        ("adapter_model.safetensors", "an adapter"),
        ("x.ckpt", "a pickle"),
    ],
)
def test_other_kinds_of_weights_are_named(hf, name, words):
    (hf / "model.safetensors").rename(hf / name)
    with pytest.raises(CheckpointError, match=words):
        from_hf(hf)


def test_templates_are_searched_in_bounds(hf):
    "However long a template is, and whatever it repeats"
    text = "<|im_start|>system\n"
    for template in (text * 500_000, (text + "x" * 50) * 3000, "{% if a %}" * 10_000, text + "Be kind.<|im_end|>"):
        (hf / "chat_template.jinja").write_text(template)
        assert default_system(hf) == ("Be kind." if template.endswith("kind.<|im_end|>") else None)

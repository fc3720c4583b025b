"tokenizer.json: ids equal SentencePiece's on any text, marks are one id each, folders are read by transformers and by ourselves"

import io
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from internlm_nb.data.chat import chat_ids, chat_text
from internlm_nb.data.corpus import corpus
from internlm_nb.data.tokenizer import MARKS, Tokenizer, train_tokenizer
from internlm_nb.hub.hf_tokenizer import (
    JsonTokenizer,
    chat_style,
    fast_tokenizer,
    load_tokenizer,
    read_model,
    special_ids,
    write_tokenizer,
)
from internlm_nb.hub.huggingface import from_hf, hf_to_native, native_to_hf, to_hf
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.transformer import Transformer

TEXTS = [text for kind in corpus().values() for text in kind[:8]]
KINDS = ("own", "v1", "v2")
CFG = ModelConfig(
    "internlm2",
    vocab_size=1800,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    mlp_ratio=2.0,
    multiple_of=8,
)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    "Trained as ours are, and with the free and the marked pieces that InternLM's two tokenizers have at their ends"
    place = tmp_path_factory.mktemp("tokenizers")
    last = {
        "v1": ["<eoh>", "<eoa>", "<TOKENS_UNUSED_2>"],
        "v2": ["Ｅ", "。", *(f"[UNUSED_TOKEN_{i}]" for i in range(139, 147))],
    }
    made = {
        kind: train_tokenizer(TEXTS, place / f"{kind}.model", 1800, last.get(kind, list(MARKS)), 0.98) for kind in KINDS
    }
    assert made["v2"].marks["<|im_start|>"] == made["v2"].sp.piece_to_id("[UNUSED_TOKEN_146]")
    return made


@pytest.fixture(scope="session")
def fast(tokenizers) -> dict[str, FastTokenizer]:
    "The same, exported"
    return {kind: FastTokenizer.from_str(json.dumps(fast_tokenizer(t))) for kind, t in tokenizers.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_text(kind, tokenizers, fast):
    "Every document and every line of the held-out corpus; and back"
    texts = [t for documents in corpus("valid").values() for t in documents]
    texts += [line for t in texts for line in t.split("\n")][:20_000]
    expected = tokenizers[kind].sp.encode(texts, num_threads=1)
    found = [e.ids for e in fast[kind].encode_batch(texts)]
    assert sum(a != b for a, b in zip(expected, found)) == 0
    assert all(fast[kind].decode(ids) == text for ids, text in zip(expected[:3000], texts))


alphabet = st.one_of(
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\t",
            "▁",
            "a",
            "the ",
            "ing",
            "，",
            "。",
            "不",
            "之",
            "Ｅ",
            "é",
            "e\u0301",
            "😀",
            "\u200b",
            "\ufeff",
            "<",
            "|",
            ">",
            "[UNUSED",
            "<0x41>",
            "12",
            "\r\n",
            "\x7f",
        ]
    ),
    st.characters(min_codepoint=1, exclude_categories=("Cs",)),
)


@given(st.lists(alphabet, max_size=40).map("".join), st.sampled_from(KINDS))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_text(tokenizers, fast, text, kind):
    "Whatever characters: the ids are SentencePiece's (a text that spells a mark or a free piece aside)"
    if any(mark in text for mark in (*tokenizers[kind].marks, "<s>", "</s>", "<unk>")):
        return
    assert fast[kind].encode(text).ids == tokenizers[kind].sp.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_marks(kind, tokenizers, fast, tmp_path):
    "Each mark is its one id, alone and between words, in tokenizers, in transformers and for the wrapper; so are bos and eos"
    tokenizer = tokenizers[kind]
    write_tokenizer(tokenizer, tmp_path)
    theirs, wrapped = AutoTokenizer.from_pretrained(tmp_path), JsonTokenizer(tmp_path)
    assert wrapped.marks == tokenizer.marks and len(wrapped) == len(tokenizer) == len(theirs)
    for mark, id in {**tokenizer.marks, "<s>": 1, "</s>": 2}.items():
        assert (
            fast[kind].encode(mark).ids
            == theirs(mark, add_special_tokens=False)["input_ids"]
            == wrapped.encode(mark)
            == [id]
        )
        between = [*tokenizer.sp.encode("so "), id, *tokenizer.sp.encode(" on")]
        assert (
            fast[kind].encode(f"so {mark} on").ids
            == theirs(f"so {mark} on", add_special_tokens=False)["input_ids"]
            == between
        )
    assert (wrapped.bos_id, wrapped.eos_id, wrapped.unk_id) == (1, 2, 0) and (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    ) == (1, 2, 2)
    assert not set(tokenizer.marks.values()) & set(wrapped.encode("".join(tokenizer.marks), marks=False))


@pytest.mark.parametrize("kind, style", [("own", "v2"), ("v2", "v2"), ("v1", "v1")])
def test_chat_templates(kind, style, tokenizers, tmp_path):
    "The Jinja template gives our text and our ids, with and without the beginning of an answer; an unknown role is refused"
    tokenizer = tokenizers[kind]
    assert chat_style(tokenizer) == style
    write_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": 'Say "{{ x }}" \\ <b>'},
        {"role": "assistant", "content": "好。\n"},
        {"role": "user", "content": "bye"},
    ]
    for answer in (False, True):
        options = dict(add_generation_prompt=answer)
        assert theirs.apply_chat_template(messages, tokenize=False, **options) == "<s>" + chat_text(
            messages, style, answer
        )
        assert theirs.apply_chat_template(messages, return_dict=False, **options) == chat_ids(
            tokenizer, messages, style, answer
        )
    with pytest.raises(Exception, match="knows the roles"):
        theirs.apply_chat_template([{"role": "nobody", "content": "x"}])


def test_bos_in_front(tokenizers, tmp_path):
    "As the model was trained: in front of plain text, in tokenizers and transformers, unless asked otherwise; once in a chat"
    own = tokenizers["own"]
    for add_bos in (None, True, False):
        folder = tmp_path / str(add_bos)
        folder.mkdir()
        write_tokenizer(own, folder, add_bos)
        ids, theirs = own.encode("Hello", bos=add_bos is not False), AutoTokenizer.from_pretrained(folder)
        assert (
            theirs("Hello")["input_ids"]
            == FastTokenizer.from_file(str(folder / "tokenizer.json")).encode("Hello").ids
            == ids
        )
        assert load_tokenizer(folder).encode("Hello") == JsonTokenizer(folder).encode("Hello") == own.encode("Hello")
        assert JsonTokenizer(folder).adds_bos == (add_bos is not False)
        chat = theirs.apply_chat_template(
            [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False
        )
        assert chat == chat_ids(own, [("user", "Hello")]) and chat.count(own.bos_id) == 1


def test_model_folders_carry_their_tokenizer(tokenizers, tmp_path):
    "to_hf and the converters ship it, from_hf reads it back; ids of the ends stand in both configs; a tokenizer of another model is refused"
    tokenizer, model = tokenizers["v2"], Transformer(CFG)
    to_hf(model, tokenizer, tmp_path / "hf")
    for file in ("config.json", "generation_config.json"):
        assert special_ids(tokenizer).items() <= json.loads((tmp_path / "hf" / file).read_text()).items()
    assert special_ids(tokenizer)["eos_token_id"] == [2, tokenizer.marks["<|im_end|>"]]
    back = from_hf(tmp_path / "hf")[1]
    assert (
        isinstance(back, JsonTokenizer)
        and back.marks == tokenizer.marks
        and (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    )
    hf_to_native(tmp_path / "hf", tmp_path / "native")
    native_to_hf(tmp_path / "native", tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }
    with pytest.raises(ValueError, match="has 1800 pieces, and the model's vocab_size is 900"):
        to_hf(Transformer(replace(CFG, vocab_size=900)), tokenizer, tmp_path / "small")


def test_folders_with_only_tokenizer_json(tokenizers, tmp_path, monkeypatch):
    "They work through the tokenizers package, go out again as they came, and without the package there is a reason"
    to_hf(Transformer(CFG), tokenizers["own"], tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    model, tokenizer = from_hf(tmp_path / "hf")
    assert isinstance(tokenizer, JsonTokenizer)
    to_hf(model, tokenizer, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }
    text = "<|im_start|>user\n不亦說乎 def f(x):<|im_end|>\n"
    assert tokenizer.encode(text, bos=True, eos=True) == tokenizers["own"].encode(text, bos=True, eos=True)
    assert tokenizer.encode_batch([text, "a"]) == tokenizers["own"].encode_batch([text, "a"])
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
    assert tokenizer.piece_to_id("<|im_end|>") == tokenizer.marks["<|im_end|>"] and tokenizer.id_to_piece(1) == "<s>"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([1800])
    with pytest.raises(KeyError, match="has no piece"):
        tokenizer.piece_to_id("no such piece")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.warns(UserWarning, match="pip install tokenizers"):
        assert from_hf(tmp_path / "hf")[1] is None


def test_models_that_cannot_be_exported(tmp_path):
    "A normalizer or a dummy prefix is refused by name, not exported wrongly"
    options = dict(
        sentence_iterator=iter(["a b c d e f g"] * 9),
        vocab_size=24,
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    for change, words in ((dict(normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, remove_extra_whitespaces=False), "the normalizer nmt_nfkc"),
                          (dict(normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False), "a dummy prefix"),
                          (dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=True), "removal of extra spaces")):  # fmt: skip
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            model_writer=model, **(options | dict(sentence_iterator=iter(["a b c d e f g"] * 9)) | change)
        )
        (tmp_path / "t.model").write_bytes(model.getvalue())
        with pytest.raises(ValueError, match=words):
            fast_tokenizer(Tokenizer(tmp_path / "t.model"))
    unigram = train_tokenizer(
        TEXTS, tmp_path / "u.model", vocab_size=1800, character_coverage=0.98, model_type="unigram"
    )
    with pytest.raises(ValueError, match="a unigram model"):
        to_hf(Transformer(CFG), unigram, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    for data in (b"", b"\xff" * 20, b"\x0a\x7f"):
        (tmp_path / "t.model").write_bytes(data)
        if data:
            with pytest.raises(ValueError, match="is not a SentencePiece model"):
                read_model(tmp_path / "t.model")


def test_the_light_install_is_enough():
    "Export needs neither tokenizers nor transformers: importing the hub loads none of them"
    code = "import sys; import internlm_nb.hub.huggingface; print([m for m in ('tokenizers', 'transformers', 'google.protobuf', 'safetensors', 'nbdev', 'fastcore') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )


def test_no_tokenizer_is_said(tmp_path):
    "A folder without one gives None and a reason"
    to_hf(Transformer(CFG), None, tmp_path / "hf")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert from_hf(tmp_path / "hf")[1] is None
    assert "neither tokenizer.model nor tokenizer.json" in str(said[0].message)

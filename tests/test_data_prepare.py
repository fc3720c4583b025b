"Laws of tokenizer, chat, text sources and prepare_data.py"

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.apps.prepare import main
from internlm_nb.data.build import Recipe, build, plan_files
from internlm_nb.data.chat import alpaca_ids, chat_ids, chat_text, conversation_ids
from internlm_nb.data.corpus import build_token_folder, corpus, corpus_with_sources
from internlm_nb.data.text import TextError, read_documents
from internlm_nb.data.tokenfiles import read_tokens
from internlm_nb.data.tokenizer import MARKS, Tokenizer, train_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [text for texts in corpus("valid").values() for text in texts]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tok") / "t.model", 3000, marks=(*MARKS, "<eoh>", "<eoa>"))


# --- tokenizer --------------------------------------------------------------------------------------------------------

# NUL is SentencePiece's own; U+2581 is how it writes a blank
TEXT = st.text(st.characters(exclude_characters="\0\u2581", exclude_categories=("Cs",)), max_size=60)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.one_of(TEXT, st.sampled_from([*MARKS, "<eoh>", " ", "\n", "\t", "    "])), max_size=6).map("".join))
def test_decode_undoes_encode(tok, text):
    for marks in (True, False):
        ids = tok.encode(text, marks=marks)
        assert tok.decode(ids) == text and all(0 <= i < len(tok) for i in ids)
        assert tok.encode_batch([text, "x"], bos=True, marks=marks)[0] == [tok.bos_id, *ids]
        if not marks:
            assert not set(ids) & set(tok.marks.values())


def test_the_whole_corpus_survives(tok):
    for split in ("train", "valid"):
        for texts in corpus(split).values():
            assert all(tok.decode(ids) == text for text, ids in zip(texts, tok.encode_batch(texts)))


def test_training_is_deterministic(tmp_path):
    texts = corpus("valid")["en"]
    for name in "ab":
        train_tokenizer(texts, tmp_path / name, 1500)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_training_says_what_to_change(tmp_path):
    with pytest.raises(ValueError, match="give more text or a smaller vocab_size"):
        train_tokenizer(["a b c"], tmp_path / "a", 5000)
    with pytest.raises(ValueError, match="raise vocab_size, or lower character_coverage"):
        train_tokenizer(corpus("valid")["cn"], tmp_path / "a", 1000)
    assert not list(tmp_path.iterdir())


def test_marks_are_one_id_each(tok):
    for mark, id in tok.marks.items():
        assert (
            tok.encode(f"a{mark}b") == [*tok.encode("a"), id, *tok.encode("b")]
            and tok.piece_to_id(mark) == id
            and tok.id_to_piece(id) == mark
        )
    assert (tok.bos_id, tok.eos_id, tok.unk_id, tok.pad_id) == (1, 2, 0, -1)


def test_free_pieces_get_the_names_of_marks(tmp_path):
    free = [f"[UNUSED_TOKEN_{n}]" for n in range(141, 147)]
    # a model like InternLM 2's: pieces kept free under these names
    released = train_tokenizer(corpus("valid")["en"], tmp_path / "t.model", 1000, marks=free)
    assert list(released.marks) == list(MARKS)
    assert released.encode("<|im_start|>user\n") == [
        released.piece_to_id("[UNUSED_TOKEN_146]"),
        *released.encode("user\n"),
    ]
    assert released.decode(released.encode("<|im_end|>")) == "<|im_end|>"
    assert released.marks["<|plugin|>"] == released.piece_to_id("[UNUSED_TOKEN_141]")
    for text in ("<|im_start|>", "[UNUSED_TOKEN_146]"):  # neither spelling can be smuggled in
        assert not set(released.encode(text, marks=False)) & set(released.marks.values())


# --- chat -------------------------------------------------------------------------------------------------------------


class Letters:
    "The interface of a tokenizer, with the ids of InternLM 1's marks; a character is its code + 1000"

    bos_id, eos_id, vocab_size, path = 1, 2, 103168, "letters"
    marks = {"<eoh>": 103027, "<eoa>": 103028}  # noqa: RUF012

    def encode(self, text, bos=False, eos=False, marks=True):
        return [364 if c == "\n" else ord(c) + 1000 for c in text]


def test_alpaca_of_internlm_1():
    t = Letters()
    enc = t.encode
    record = {"instruction": "Add", "input": "1 2", "output": "3"}
    read = [*enc("<|User|>:Add\n1 2"), 103027, 364, *enc("<|Bot|>:")]
    assert alpaca_ids(t, record) == [1, *(-i for i in read), *enc("3"), 103028, 364, 2]
    assert alpaca_ids(t, {**record, "input": ""}) == alpaca_ids(t, {"instruction": "Add", "output": "3"})
    assert alpaca_ids(t, record, max_length=20) == alpaca_ids(t, record)[:20]
    older = [1, *(-i for i in [*enc("<|User|>:Add\n1 2"), 103167, 13, *enc("<|Bot|>:")]), *enc("3"), 103166, 13]
    assert alpaca_ids(t, record, compat="internevo") == [*older, 2]
    assert alpaca_ids(t, record, max_length=20, compat="internevo") == [*older[:19], 2]
    assert alpaca_ids(t, record, max_length=len(older), compat="internevo") == [*older[:-1], 2]
    assert alpaca_ids(t, record, max_length=len(older) + 1, compat="internevo") == [*older, 2]
    for bad in ({"input": "x", "output": "y"}, {"instruction": "x"}, {"instruction": "x", "output": 3}):
        with pytest.raises(ValueError, match="an Alpaca record needs"):
            alpaca_ids(t, bad)
    with pytest.raises(ValueError, match=r"needs the mark <.im_end.>, which letters does not have"):
        alpaca_ids(t, record, style="v2")


WORDS = st.text(st.sampled_from("ab \n<|im_end|>eoh1"), max_size=20)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.one_of(WORDS, st.just("<|im_end|>\n"))),
        max_size=5,
    ),
    st.booleans(),
)
def test_conversations(tok, turns, answer):
    "Ids decode to the text; exactly two marks a turn, whatever is written; only answers are targets"
    messages = [{"role": role, "content": words} for role, words in turns]
    ids = chat_ids(tok, messages, "v2", answer)
    assert tok.decode(ids) == chat_text(messages, "v2", answer)
    assert (
        sum(i == tok.marks["<|im_end|>"] for i in ids) == len(turns)
        and sum(i == tok.marks["<|im_start|>"] for i in ids) == len(turns) + answer
    )
    trained = conversation_ids(tok, messages, "v2")
    assert [abs(i) for i in trained] == [*chat_ids(tok, messages, "v2", answer=False), tok.eos_id]
    assert tok.decode(i for i in trained if i > 0) == "".join(
        f"{words}<|im_end|>\n" for role, words in turns if role == "assistant"
    )


# --- text -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.text(st.sampled_from("ab \n\r\t中"), max_size=60))
def test_documents_of_a_text(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode())
    assert list(read_documents(path, "line")) == [line.strip() for line in text.split("\n") if line.strip()]
    assert list(read_documents(path, "file")) == ([text] if text.strip() else [])
    paragraphs = list(read_documents(path, "paragraph"))
    assert all(p.strip() and not any(not line.strip() for line in p.split("\n")) for p in paragraphs)
    assert [c for p in paragraphs for c in p if not c.isspace()] == [c for c in text if not c.isspace()]


def test_encodings(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "gb18030", "utf-16"):
        (tmp_path / "a.txt").write_bytes("一\n二三\n".encode(encoding))
        assert list(read_documents(tmp_path / "a.txt", encoding="utf-8" if "utf-8" in encoding else encoding)) == [
            "一",
            "二三",
        ]
    (tmp_path / "a.txt").write_bytes("一\n二三\n".encode("gb18030"))
    with pytest.raises(TextError, match=r"a\.txt, line 2: bytes that are not utf-8"):
        list(read_documents(tmp_path / "a.txt"))
    with pytest.raises(LookupError):
        list(read_documents(tmp_path / "a.txt", encoding="klingon"))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2: bad json"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "line 2: not a json object"),
        ("a.jsonl", '{"text": "x"}\n\n{"body": "y"}\n', "line 3: no text under the key 'text' .its keys: body"),
        ("a.jsonl", '{"text": 5}\n', "line 1: no text"),
        ("a.json", '[{"text": "x"},\n{"text" "y"}]', "line 2: bad json"),
        ("a.json", '{"text": "x"}', "not a json list"),
        ("a.json", '[{"text": "x"}, 3]', "record 1 .from 0. is not a json object"),
    ],
)
def test_bad_sources_are_named(tmp_path, tok, name, content, says, capsys):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=says):
        list(read_documents(tmp_path / name))
    assert main(["build", str(tmp_path / name), str(tmp_path / "out"), "--tokenizer", str(tok.path)]) == 2
    assert name in capsys.readouterr().err and not list(tmp_path.rglob("*.bin*"))


# --- prepare_data.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    src = tmp_path / "src"
    (src / "deep").mkdir(parents=True)
    (src / "a.txt").write_text("\n".join(f"line {i} of some text" for i in range(3000)))
    (src / "deep" / "b.jsonl").write_text(
        "".join(json.dumps({"text": f"record {i}\nwith two lines"}) + "\n" for i in range(2000))
    )
    (src / "deep" / "c.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    return src


def test_files_do_not_depend_on_the_processes(tmp_path, sources, tok, monkeypatch):
    "Byte for byte, and equal to encoding each document by hand"
    import internlm_nb.data.build as build_module

    monkeypatch.setattr(build_module, "_BATCH_CHARS", 1000)
    recipe = Recipe(str(tok.path))
    made = {}
    for processes in (1, 2, 3):
        root = tmp_path / str(processes)
        build([sources], root / "en", recipe, processes, progress=False)
        made[processes] = {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*.bin*"))}
    assert made[1] == made[2] == made[3]
    assert sorted(map(str, made[1])) == [
        "en/a.bin",
        "en/a.bin.meta",
        "en/deep/b.bin",
        "en/deep/b.bin.meta",
        "en/deep/c.bin",
        "en/deep/c.bin.meta",
    ]
    expected = [json.dumps({"tokens": [1, *tok.encode(f"line {i} of some text"), 2]}) + "\n" for i in range(3000)]
    assert made[1][Path("en/a.bin")] == "".join(expected).encode()
    assert np.load(tmp_path / "1/en/a.bin.meta").tolist() == [
        [sum(map(len, expected[:i])), len(json.loads(line)["tokens"])] for i, line in enumerate(expected)
    ]


def test_one_file_of_many_sources(tmp_path, sources, tok):
    build(
        [sources / "a.txt", sources / "deep"],
        tmp_path / "en" / "all.bin",
        Recipe(str(tok.path), bos=False, eos=False),
        1,
        progress=False,
    )
    docs = read_tokens(tmp_path / "en" / "all.bin")
    assert len(docs) == 5002 and tok.decode(docs[0]) == "line 0 of some text" and tok.decode(docs[-1]) == "two"


def test_alpaca_from_the_command_line(tmp_path, tok, capsys):
    records = [{"instruction": f"Say {i}", "input": "" if i % 2 else "now", "output": str(i)} for i in range(50)]
    (tmp_path / "sft.json").write_text(json.dumps(records))
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name in ("sft.json", "sft.jsonl"):
        for style in ("v1", "v2"):
            target = tmp_path / f"{name}-{style}" / "en"
            assert (
                main(
                    [
                        "build",
                        str(tmp_path / name),
                        str(target),
                        "--tokenizer",
                        str(tok.path),
                        "--format",
                        "alpaca",
                        "--template",
                        style,
                        "--max-length",
                        "30",
                    ]
                )
                == 0
            )
            assert [d.tolist() for d in read_tokens(target.parent)] == [alpaca_ids(tok, r, style, 30) for r in records]
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x", "output": "y"}\n{"instruction": "x"}\n')
    assert (
        main(
            [
                "build",
                str(tmp_path / "bad.jsonl"),
                str(tmp_path / "bad"),
                "--tokenizer",
                str(tok.path),
                "--format",
                "alpaca",
            ]
        )
        == 2
    )
    assert 'bad.jsonl, line 2: an Alpaca record needs a text under "output"' in capsys.readouterr().err


def test_nothing_is_overwritten_unless_asked(tmp_path, sources, tok, capsys):
    argv = ["build", str(sources), str(tmp_path / "en"), "--tokenizer", str(tok.path), "--processes", "1"]
    assert main(argv) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin*")}
    assert main(argv) == 0 and "left as it is" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin*")}
    (tmp_path / "en" / "a.bin").unlink()
    assert main(argv) == 2 and "exists" in capsys.readouterr().err
    assert not (tmp_path / "en" / "a.bin").exists()  # refused before anything was begun
    assert main([*argv, "--overwrite"]) == 0
    assert before.keys() == {p: 0 for p in tmp_path.rglob("*.bin*")}.keys()


def test_a_failing_build_keeps_the_old_file(tmp_path, tok):
    (tmp_path / "a.txt").write_text("good")
    argv = [
        "build",
        str(tmp_path / "a.txt"),
        str(tmp_path / "en"),
        "--tokenizer",
        str(tok.path),
        "--processes",
        "2",
        "--overwrite",
    ]
    assert main(argv) == 0
    before = (tmp_path / "en" / "a.bin").read_bytes()
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 100_000 + b"\xff\n")
    assert main(argv) == 2
    assert (tmp_path / "en" / "a.bin").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "en").iterdir()) == [
        ".build.jsonl",
        "a.bin",
        "a.bin.meta",
        "tokenizer.model",
    ]


def test_errors_of_the_command_line(tmp_path, tok, capsys):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty.txt").write_text("\n \n")
    for argv, says in (
        (["build", "nowhere.txt", str(tmp_path / "o"), "--tokenizer", str(tok.path)], "nowhere.txt is neither"),
        (["build", str(tmp_path / "a.txt"), str(tmp_path / "o"), "--tokenizer", "no.model"], "no tokenizer model"),
        (
            ["build", str(tmp_path / "empty.txt"), str(tmp_path / "o"), "--tokenizer", str(tok.path)],
            "there is no document in",
        ),
        (
            ["build", str(tmp_path / "a.txt"), str(tmp_path / "o"), "--tokenizer", str(tok.path), "--processes", "0"],
            "--processes must be at least 1",
        ),
        (["verify", str(tmp_path / "nowhere")], "neither a folder"),
        (["show", str(tmp_path / "a.txt"), "--tokenizer", str(tok.path)], "a.txt.meta"),
    ):
        assert main(argv) == 2
        assert says in capsys.readouterr().err, argv
    with pytest.raises(SystemExit):
        main(["build"])
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="would both become"):
        plan_files([tmp_path / "a.txt", tmp_path / "a.jsonl"], tmp_path / "o")


def test_decode_gives_the_text_back(tmp_path, sources, tok):
    assert main(["build", str(sources / "deep" / "b.jsonl"), str(tmp_path / "en"), "--tokenizer", str(tok.path)]) == 0
    for name in ("back.jsonl", "back.txt"):
        assert main(["decode", str(tmp_path / "en" / "b.bin"), str(tmp_path / name), "--tokenizer", str(tok.path)]) == 0
    assert (tmp_path / "back.jsonl").read_text() == (sources / "deep" / "b.jsonl").read_text()
    assert (tmp_path / "back.txt").read_text() == "".join(f"record {i}\nwith two lines\n" for i in range(2000))
    assert (
        main(["decode", str(tmp_path / "en" / "b.bin"), str(tmp_path / "back.txt"), "--tokenizer", str(tok.path)]) == 2
    )


def test_verify_and_show_in_process(tmp_path, tok, capsys):
    "The same commands without a process of their own"
    assert main(["corpus", str(tmp_path), "--vocab-size", "6000"]) == 0
    assert "train: cn" in capsys.readouterr().out
    model = str(tmp_path / "tokenizer.model")
    assert main(["corpus", str(tmp_path), "--vocab-size", "6000"]) == 2 and "exists" in capsys.readouterr().err
    assert (
        main(["verify", str(tmp_path / "valid"), "--tokenizer", model, "--processes", "1"]) == 0
        and "sound" in capsys.readouterr().out
    )
    assert main(["verify", str(tmp_path / "valid"), "--vocab-size", "300", "--processes", "1"]) == 1
    said = capsys.readouterr()
    assert "outside the vocabulary of 300" in said.out and "faults in" in said.err
    assert main(["show", str(tmp_path / "valid"), "--tokenizer", model, "--first", "1", "--count", "2"]) == 0
    said = capsys.readouterr().out
    assert "document 1, type cn" in said and corpus("valid")["cn"][2] in said


def test_the_script(tmp_path, tok):
    "As a user runs it: corpus, verify, and verify of a broken folder"

    def script(*argv):
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *map(str, argv)], capture_output=True, text=True
        )

    done = script("corpus", tmp_path, "--tokenizer", tok.path)
    assert done.returncode == 0, done.stderr
    sound = script("verify", tmp_path / "train", "--tokenizer", tok.path)
    assert sound.returncode == 0 and "sound" in sound.stdout and "types cn, code, en" in sound.stdout
    path = tmp_path / "train" / "en" / "corpus.bin"
    path.write_bytes(path.read_bytes().replace(b"]}", b" }", 1))
    broken = script("verify", tmp_path / "train", "--tokenizer", tok.path)
    assert broken.returncode == 1 and f"{path}, line 1: bad json" in broken.stdout and "1 fault in" in broken.stderr
    # preparing data needs no torch: a worker starts in a fraction of a second
    light = "import sys; import internlm_nb.apps.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light]).returncode == 0


# --- corpus -----------------------------------------------------------------------------------------------------------


def test_corpus_is_small_split_and_licensed():
    folder = ROOT / "internlm_nb" / "corpus"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 2_000_000
    assert {p.name for p in (folder / "LICENSES").iterdir()} == {"PSF-2.0.txt", "MIT-chinese-poetry.txt"}
    train, valid = corpus("train"), corpus("valid")
    for kind in ("cn", "code", "en"):
        assert not set(train[kind]) & set(valid[kind])
        share = sum(len(t.encode()) for t in valid[kind]) / sum(len(t.encode()) for t in train[kind] + valid[kind])
        assert 0.04 < share < 0.055
        assert all(text.strip() for text in train[kind] + valid[kind])
    for kind, works in (("en", 4), ("cn", 2)):  # held-out pieces of every work
        assert len({source for source, _ in corpus_with_sources("valid")[kind]}) == works
    assert not any("opyright" in text for texts in (train["code"], valid["code"]) for text in texts)


def test_build_token_folder(tmp_path, tok):
    counts = build_token_folder({"en": ["one", "two"], "cn": ["三"]}, tok, tmp_path)
    docs = read_tokens(tmp_path, vocab_size=len(tok))
    assert (
        docs.types == ["cn", "en"]
        and [tok.decode(d) for d in docs] == ["三", "one", "two"]
        and sum(counts.values()) == docs.num_tokens
    )
    assert all(d[0] == tok.bos_id and d[-1] == tok.eos_id for d in docs)
    assert isinstance(Tokenizer(tok.path), Tokenizer)

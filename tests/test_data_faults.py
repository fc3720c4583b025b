"What folders and files of other people do to the data part: links, copies, damaged and foreign files, builds that were cut off"

import bz2
import errno
import gzip
import json
import lzma
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from internlm_nb.apps.prepare import main, open_tokenizer
from internlm_nb.data.build import Recipe, build, plan_files
from internlm_nb.data.chat import alpaca_ids
from internlm_nb.data.encode import is_held_out
from internlm_nb.data.facts import differences, folder_facts, look_at
from internlm_nb.data.loader import DataConfig, Loader, make_validation
from internlm_nb.data.plan import held_out_beside
from internlm_nb.data.provenance import find_tokenizer, tokenizer_fingerprint
from internlm_nb.data.sources import TextError
from internlm_nb.data.text import read_documents, read_records
from internlm_nb.data.tokenfiles import TokenFile, TokenWriter, read_tokens, write_tokens
from internlm_nb.data.tokenizer import MARKS, train_tokenizer
from internlm_nb.data.tokenline import TokenFileError
from internlm_nb.data.verify import survey, verify

TEXTS = ["the quick brown fox jumps over the lazy dog " * 40, "pack my box with five dozen liquor jugs\n" * 40]


@pytest.fixture(scope="module")
def toks(tmp_path_factory):
    "Two tokenizers that cut differently"
    folder = tmp_path_factory.mktemp("toks")
    return [train_tokenizer(TEXTS, folder / f"{n}.model", n, marks=(*MARKS, "<eoh>", "<eoa>")) for n in (330, 320)]


@pytest.fixture(scope="module")
def tok(toks):
    return toks[0]


def run(capsys, *argv):
    "(exit code, stdout, stderr) of the command line"
    code = main([str(a) for a in argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def make(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def recipe(tok, **more):
    return Recipe(str(tok.path), **more)


# --- what a folder holds ----------------------------------------------------------------------------------------------


def test_linked_folders_and_files_are_read(tmp_path, tok):
    write_tokens(tmp_path / "r/en/a.bin", [[1, 11]])
    write_tokens(tmp_path / "far/cn/deep/b.bin", [[1, 12]])
    write_tokens(tmp_path / "far/c.bin", [[1, 13]])
    (tmp_path / "r/cn").symlink_to(tmp_path / "far/cn")
    for end in ("", ".meta"):
        (tmp_path / f"r/en/z.bin{end}").symlink_to(tmp_path / f"far/c.bin{end}")
    (tmp_path / "link").symlink_to("r")
    for root in (tmp_path / "r", tmp_path / "link"):
        docs = read_tokens(root)
        assert (docs.types, [int(d[1]) for d in docs]) == (["cn", "en"], [12, 11, 13])
        assert verify(root, processes=1) == [] and survey(root, processes=1).documents == 3
    make(tmp_path / "far/texts/t.txt", "one\n")
    make(tmp_path / "src/u.txt", "two\n")
    (tmp_path / "src/linked").symlink_to(tmp_path / "far/texts")
    (tmp_path / "src/w.txt").symlink_to(tmp_path / "far/texts/t.txt")
    names = [p.relative_to(tmp_path / "out").as_posix() for p in plan_files([tmp_path / "src"], tmp_path / "out")]
    assert names == ["linked/t.bin", "u.bin", "w.bin"]


def test_all_types_linked(tmp_path):
    write_tokens(tmp_path / "far/a.bin", [[1, 2]])
    (tmp_path / "r").mkdir()
    for name in ("cn", "en"):
        (tmp_path / "r" / name).symlink_to("../far")
    assert read_tokens(tmp_path / "r").types == ["cn", "en"] and len(read_tokens(tmp_path / "r")) == 2


@pytest.mark.parametrize("target", ["..", ".", "../en", "../../r"])
def test_cycles_of_links_end(tmp_path, target):
    write_tokens(tmp_path / "r/en/a.bin", [[1, 2]])
    make(tmp_path / "r/en/a.txt", "one\n")
    (tmp_path / "r/en/loop").symlink_to(target)
    docs = read_tokens(tmp_path / "r")
    assert len(docs) == 1 and "en/loop (a link back to a folder above it)" in docs.remarks[0]
    assert verify(tmp_path / "r", processes=1) == [] and len(plan_files([tmp_path / "r"], tmp_path / "o")) == 1


def test_two_folders_that_link_to_each_other(tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        write_tokens(tmp_path / f"r/{one}/x.bin", [[1, 2]])
        (tmp_path / f"r/{one}/to").symlink_to(f"../{other}")
    assert len(read_tokens(tmp_path / "r")) == 4  # each is read where it lies and through the other's link


@pytest.mark.parametrize("name", ["cn", "en/b.bin", "en/b.bin.meta", "en/deep"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, tok, name):
    write_tokens(tmp_path / "r/en/a.bin", [[1, 2]])
    (tmp_path / "r" / name).symlink_to("gone")
    with pytest.raises(TokenFileError, match=r"a link that leads nowhere \(to gone\)") as caught:
        read_tokens(tmp_path / "r")
    assert caught.value.path == str(tmp_path / "r" / name)
    assert [f.path for f in verify(tmp_path / "r", processes=1)] == [str(tmp_path / "r" / name)]
    make(tmp_path / "s/a.txt", "one\n")
    (tmp_path / "s/more").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match="more: a link that leads nowhere"):
        plan_files([tmp_path / "s"], tmp_path / "o")
    (tmp_path / "root").symlink_to("gone")
    for call in (read_tokens, verify):
        with pytest.raises(FileNotFoundError, match="is a link that leads nowhere"):
            call(tmp_path / "root")
    (tmp_path / "self.txt").symlink_to("self.txt")
    with pytest.raises((FileNotFoundError, OSError)):
        plan_files([tmp_path / "self.txt"], tmp_path / "o")


def test_copies_and_companions_are_left_out(tmp_path, tok, capsys):
    good = write_tokens(tmp_path / "r/en/a.bin", [[1, 2]]).read_bytes()
    write_tokens(tmp_path / "r/.ipynb_checkpoints/a.bin", [[1, 2]])
    write_tokens(tmp_path / "r/__MACOSX/en/a.bin", [[1, 2]])
    make(tmp_path / "r/en/._a.bin", b"\x00\x05\x16\x07")
    make(tmp_path / "r/en/Thumbs.db", good)
    docs = read_tokens(tmp_path / "r")
    assert docs.types == ["en"] and len(docs) == 1
    for name in (".ipynb_checkpoints (hidden)", "__MACOSX (made by the system)", "en/._a.bin (hidden)"):
        assert name in docs.remarks[0]
    assert verify(tmp_path / "r", processes=1) == []
    for name, content in (
        ("a.txt", "one\n"),
        (".ipynb_checkpoints/a-checkpoint.txt", "one\n"),
        ("._a.txt", b"\x00\x05\x16\x07\xff"),
        ("deep/.b.txt", "x\n"),
    ):
        make(tmp_path / "n" / name, content)
    code, out, _ = run(capsys, "build", tmp_path / "n", tmp_path / "n.bin", "--tokenizer", tok.path)
    assert code == 0 and len(read_tokens(tmp_path / "n.bin")) == 1
    assert out.count("left out of") == 1 and ".ipynb_checkpoints (hidden)" in out and "._a.txt (hidden)" in out
    make(tmp_path / ".hidden/a.txt", "one\n")  # a hidden folder that is named is meant
    assert len(plan_files([tmp_path / ".hidden"], tmp_path / "o")) == 1


def test_only_regular_files_are_opened(tmp_path, tok):
    write_tokens(tmp_path / "r/en/a.bin", [[1, 2]])
    os.mkfifo(tmp_path / "r/en/pipe.bin")
    (tmp_path / "r/en/null.bin").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(tmp_path / "r/en/s.bin"))
        docs = read_tokens(tmp_path / "r")
    assert len(docs) == 1
    for said in ("pipe.bin (a pipe", "null.bin (a device", "s.bin (a socket"):
        assert said in docs.remarks[0]
    assert verify(tmp_path / "r", processes=1) == []
    for path in ("r/en/pipe.bin", "r/en/null.bin", "r/en/s.bin"):
        for call in (read_tokens, TokenFile):
            with pytest.raises(TokenFileError, match="not a regular file"):
                call(tmp_path / path)
    (tmp_path / "r/en/a.bin.meta").unlink()
    os.mkfifo(tmp_path / "r/en/a.bin.meta")
    with pytest.raises(TokenFileError, match="this is a pipe"):
        TokenFile(tmp_path / "r/en/a.bin")
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError, match=r"p\.txt is a pipe"):
        plan_files([tmp_path / "p.txt"], tmp_path / "o")
    with pytest.raises(TextError, match="a pipe, not a regular file"):
        list(read_documents(tmp_path / "p.txt"))


def test_a_meta_file_alone_is_said(tmp_path):
    write_tokens(tmp_path / "r/en/a.bin", [[1, 2]])
    write_tokens(tmp_path / "r/en/b.bin", [[1, 2]])
    (tmp_path / "r/en/b.bin").unlink()
    assert "b.bin.meta (a meta file without its .bin file)" in read_tokens(tmp_path / "r").remarks[0]
    assert [Path(f.path).name for f in verify(tmp_path / "r", processes=1)] == ["b.bin.meta"]


def test_a_pair_in_capitals(tmp_path):
    write_tokens(tmp_path / "r/en/a.bin", [[1, 2, 3]])
    for old, new in (("a.bin", "A.BIN"), ("a.bin.meta", "A.BIN.META")):
        (tmp_path / "r/en" / old).rename(tmp_path / "r/en" / new)
    assert read_tokens(tmp_path / "r")[0].tolist() == [1, 2, 3] and verify(tmp_path / "r", processes=1) == []


def test_permission_is_called_permission(tmp_path, monkeypatch):
    "For a file, its meta file, and a whole type; as root nothing is refused, so the refusal is put in"
    write_tokens(tmp_path / "r/en/a.bin", [[1, 2]])
    write_tokens(tmp_path / "r/cn/b.bin", [[1, 2]])
    real_open, real_scandir = open, os.scandir

    def refuse(name):
        def opened(path, *more, **options):
            if str(path).endswith(name):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real_open(path, *more, **options)

        def listed(path):
            if str(path).endswith(name):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real_scandir(path)

        monkeypatch.setattr("builtins.open", opened)
        monkeypatch.setattr(os, "scandir", listed)

    for name in ("a.bin", "a.bin.meta", "cn"):
        refuse(name)
        with pytest.raises(TokenFileError, match="permission denied: this user may not read it") as caught:
            read_tokens(tmp_path / "r")
        assert caught.value.path.endswith(name)
        faults = verify(tmp_path / "r", processes=1)
        assert [f.path.endswith(name) and "permission denied" in f.fault for f in faults] == [True]
    make(tmp_path / "s/cn/a.txt", "one")
    with pytest.raises(PermissionError, match=r"cn: permission denied"):
        plan_files([tmp_path / "s"], tmp_path / "o")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
def test_permission_for_real(tmp_path):
    "As a user who may not read a type: by its name, and not as a folder without files"
    write_tokens(tmp_path / "r/cn/b.bin", [[1, 2]])
    code = "import os, sys; from internlm_nb.data.tokenfiles import read_tokens; from internlm_nb.data.verify import verify; os.setuid(65534)\n"
    code += f"for call in (read_tokens, lambda root: print(*verify(root, processes=1))):\n try: call({str(tmp_path / 'r')!r})\n except ValueError as error: print(error)"
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and "pytest" in str(folder):
            folder.chmod(0o755)
    for path, mode in ((tmp_path / "r/cn", 0o700), (tmp_path / "r/cn/b.bin", 0o600)):
        path.chmod(mode)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.splitlines() == [
            f"{path}: permission denied: this user may not read it{end}"
            for end in (": mend it, or take it out of the folder" * (mode == 0o700), "")
        ]
        path.chmod(0o755)


def test_files_that_shrink_under_a_run(tmp_path):
    "Named, and no signal that ends the process"
    rows = [[i + 1] * 500 for i in range(400)]
    path = write_tokens(tmp_path / "r/en/a.bin", rows)
    code = f"""
import os, sys
from internlm_nb.data.tokenfiles import read_tokens
docs = read_tokens({str(tmp_path / "r")!r}); docs[0]
os.truncate(sys.argv[1], int(sys.argv[2]))
for i in (399, 0, 200):
    try: print(i, len(docs[i]))
    except ValueError as error: print(i, error)
try: print(docs.lengths.sum())
except ValueError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path), "5000"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[1] == "0 500" and lines[3] == "200000", done
    assert all(f"{path}: the file was changed while it was read: it had" in lines[i] for i in (0, 2))
    write_tokens(path, rows, overwrite=True)
    done = subprocess.run([sys.executable, "-c", code, f"{path}.meta", "200"], capture_output=True, text=True)
    assert done.returncode == 0 and all(
        f"{path}.meta: the file was changed while it was read" in line for line in done.stdout.splitlines()
    ), done


# --- sources ----------------------------------------------------------------------------------------------------------


PACKS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}


@pytest.mark.parametrize("end", PACKS)
def test_compressed_sources(tmp_path, tok, end, capsys):
    text = "".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(200))
    make(tmp_path / f"s/a.JSONL.{end.upper()}", PACKS[end](text.encode()))
    make(tmp_path / f"s/b.txt.{end}", PACKS[end](b"a line\nanother\n"))
    made = build([tmp_path / "s"], tmp_path / "d/en", recipe(tok), 1, progress=False)
    assert {path.name: built.documents for path, built in made.items()} == {"a.bin": 200, "b.bin": 2}
    assert tok.decode(read_tokens(tmp_path / "d")[199]) == "record 199"
    cut = make(tmp_path / f"cut.txt.{end}", PACKS[end](os.urandom(50_000).hex().encode())[:-3000])
    with pytest.raises(TextError, match=r"cut\.txt.*damaged or cut short"):
        list(read_documents(cut))
    assert run(capsys, "build", cut, tmp_path / "o", "--tokenizer", tok.path)[0] == 2
    bad = make(tmp_path / f"bad.txt.{end}", PACKS[end](b"fine\n" * 3 + b"\xff\n"))
    with pytest.raises(TextError, match=r"line 4: bytes that are not utf-8"):
        list(read_documents(bad))
    if end != "lzma":  # which has no sign of its own
        plain = make(tmp_path / "plain.jsonl", PACKS[end](text.encode()))
        for encoding in ("utf-8", "latin-1"):
            with pytest.raises(TextError, match=rf"it is compressed \(\w+\): name it plain\.jsonl\.{end}"):
                list(read_documents(plain, encoding=encoding))
    assert list(read_documents(make(tmp_path / f"none.txt.{end}", b""))) == []


def test_packings_that_are_not_read(tmp_path):
    with pytest.raises(TextError, match=r"compressed \(zip\): unpack it first"):
        list(read_documents(make(tmp_path / "a.txt", b"PK\x03\x04rest")))
    with pytest.raises(TextError, match="it is not gzip, though its name says so"):
        list(read_documents(make(tmp_path / "a.txt.gz", b"text")))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = make(tmp_path / "a.txt.zst", zstandard.compress(b"one\n") + zstandard.compress(b"two\n"))
    assert list(read_documents(path)) == ["one", "two"]
    with pytest.raises(TextError, match="damaged"):
        list(read_documents(make(tmp_path / "b.txt.zst", path.read_bytes()[:6] + b"\xff" * 20)))


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch, tok, capsys):
    for name in ("zstandard", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    zst, table = make(tmp_path / "s/a.txt.zst", b"\x28\xb5\x2f\xfdxx"), make(tmp_path / "s/b.parquet", b"PAR1xxPAR1")
    for path, name in ((zst, "zstandard"), (table, "pyarrow")):
        code, _, err = run(capsys, "build", path, tmp_path / "o", "--tokenizer", tok.path)
        assert code == 2 and f"pip install {name}" in err and path.name in err
    assert not (tmp_path / "o").exists()  # before anything was begun


def test_parquet(tmp_path, tok):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [f"row {i}" for i in range(3000)]
    pq.write_table(
        pa.table({"text": [*texts, None, " "], "n": list(range(3002))}), tmp_path / "a.parquet", row_group_size=700
    )
    assert list(read_documents(tmp_path / "a.parquet")) == texts
    made = build([tmp_path / "a.parquet"], tmp_path / "d/en", recipe(tok), 2, progress=False)
    assert [built.documents for built in made.values()] == [3000]
    with pytest.raises(TextError, match=r"no column 'body' \(its columns: text, n\)"):
        list(read_documents(tmp_path / "a.parquet", key="body"))
    with pytest.raises(TextError, match="not a readable parquet file"):
        list(read_documents(make(tmp_path / "b.parquet", b"nothing of it")))
    chat = [{"instruction": "x", "output": "y"}]
    pq.write_table(pa.Table.from_pylist(chat), tmp_path / "c.parquet")
    assert [r for _, r in read_records(tmp_path / "c.parquet")] == chat


def test_json_and_jsonl_mixed_up(tmp_path):
    for name, content, says in (
        ("a.json", '{"text": "x"}\n{"text": "y"}\n', r"line 2: bad json \(Extra data\).*one object a line is \.jsonl"),
        ("b.json", '{"text": "x"}', "not a json list of records .one object a line is .jsonl"),
        ("c.jsonl", '[{"text": "x"}]', "a list of records is .json"),
        ("d.jsonl", '[\n{"text": "x"},\n{"text": "y"}\n]', "line 1: bad json .*a list of records is .json"),
    ):
        with pytest.raises(TextError, match=says):
            list(read_documents(make(tmp_path / name, content)))
    with pytest.raises(TextError, match="begins like a file of utf-16"):
        list(read_documents(make(tmp_path / "e.txt", "one".encode("utf-16"))))
    assert list(read_documents(make(tmp_path / "F.NDJSON", '{"text": "x"}\n'))) == ["x"]


@pytest.mark.parametrize("content", ["", " \n\t\n", '{"text": ""}\n', "[]", '{"text": " "}\n{"text": ""}\n'])
@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.json"])
def test_files_without_a_document(tmp_path, tok, capsys, content, name):
    no_document = {"b.txt": not content.strip(), "b.json": "text" not in content, "b.jsonl": content != "[]"}
    if not no_document[name]:
        return  # a document, or a fault
    make(tmp_path / "e/a.txt", "one\n")
    make(tmp_path / f"e/{name}", content)
    make(tmp_path / "e/c.txt", "two\n")
    argv = ("build", tmp_path / "e", tmp_path / "eo", "--tokenizer", tok.path)
    code, out, _ = run(capsys, *argv)
    assert code == 0 and f"left out, since there is no document in it: {tmp_path / 'e' / name}" in out
    assert sorted(p.name for p in (tmp_path / "eo").glob("*.bin")) == ["a.bin", "c.bin"]
    code, out, _ = run(capsys, *argv)
    assert code == 0 and out.count("left as it is") == 2
    code, _, err = run(capsys, "build", tmp_path / "e" / name, tmp_path / "other", "--tokenizer", tok.path)
    assert code == 2 and "there is no document in" in err


def test_half_surrogates_in_every_format(tmp_path, tok):
    "A whole pair is a character, half of one is U+FFFD"
    make(tmp_path / "a.jsonl", '{"text": "cut \\ud83d here"}\n{"text": "\\ud83d\\ude00"}\n')
    make(tmp_path / "b.json", '[{"text": "\\ude00"}]')
    make(tmp_path / "c.jsonl", '{"instruction": "cut \\ud83d", "output": "\\udfff", "history": [["\\ud83d", "x"]]}\n')
    said = []
    build(
        [tmp_path / "a.jsonl", tmp_path / "b.json"],
        tmp_path / "t.bin",
        recipe(tok, valid_share=1e-9),
        1,
        progress=False,
        say=said.append,
    )
    assert [tok.decode(d) for d in read_tokens(tmp_path / "t.bin")] == ["cut \ufffd here", "\U0001f600", "\ufffd"]
    assert any("2 documents with half of a surrogate pair" in line for line in said)
    build([tmp_path / "c.jsonl"], tmp_path / "c.bin", recipe(tok, format="alpaca", template="v2"), 1, progress=False)
    text = tok.decode(abs(read_tokens(tmp_path / "c.bin")[0]))
    assert text.count("\ufffd") == 3


# --- records ----------------------------------------------------------------------------------------------------------


def chat_build(tmp_path, tok, capsys, records, *more):
    make(tmp_path / "m.json", json.dumps(records))
    return run(
        capsys,
        "build",
        tmp_path / "m.json",
        tmp_path / "mm/x",
        "--tokenizer",
        tok.path,
        "--format",
        "chat",
        "--template",
        "v2",
        *more,
    )


def test_nothing_of_a_record_is_dropped(tmp_path, tok, capsys):
    record = {"instruction": "and now?", "output": "yes", "system": "be brief", "history": [["is it day?", "no"]]}
    assert chat_build(tmp_path, tok, capsys, [record])[0] == 0
    ids = read_tokens(tmp_path / "mm")[0]
    said = "".join(
        f"<|im_start|>{who}\n{words}<|im_end|>\n"
        for who, words in (
            ("system", "be brief"),
            ("user", "is it day?"),
            ("assistant", "no"),
            ("user", "and now?"),
            ("assistant", "yes"),
        )
    )
    assert tok.decode(abs(ids)) == said and tok.decode(ids[ids > 0]) == "no<|im_end|>\nyes<|im_end|>\n"
    with pytest.raises(ValueError, match='no place for "history"'):
        alpaca_ids(tok, {"instruction": "x", "output": "y", "history": [["a", "b"]]}, "v2")


@pytest.mark.parametrize(
    "record, says",
    [
        ({"instruction": "x", "output": "y", "input": ["x"]}, '"input" must be a text, not list'),
        ({"instruction": "x", "output": "y", "input": 0}, '"input" must be a text, not int'),
        ({"instruction": "x", "output": "y", "system": 5}, '"system" must be a text'),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, '"history" must be a list'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "has no role 'tool'"),
        ({"messages": "x"}, '"messages" must be a list'),
        ({"prompt": "x"}, 'needs a text under "instruction"'),
    ],
)
def test_records_that_are_refused(tmp_path, tok, capsys, record, says):
    code, _, err = chat_build(tmp_path, tok, capsys, [{"instruction": "x", "output": "y"}, record])
    assert code == 2 and "record 1 (from 0)" in err and says in err


def test_text_format_says_what_records_look_like(tmp_path, tok, capsys):
    for record, hint in (
        ({"instruction": "x", "output": "y"}, "--format alpaca"),
        ({"messages": []}, "--format chat"),
        ({"conversations": []}, "--format chat"),
    ):
        make(tmp_path / "a.jsonl", json.dumps(record))
        code, _, err = run(capsys, "build", tmp_path / "a.jsonl", tmp_path / "o", "--tokenizer", tok.path)
        assert code == 2 and hint in err


def test_records_without_a_target_are_left_out_and_named(tmp_path, tok, capsys):
    long, short = {"instruction": "why " * 12, "output": "so"}, {"instruction": "why", "output": "so"}
    code, _, err = chat_build(tmp_path, tok, capsys, [long], "--max-length", 12)
    assert code == 2 and "there is no document" in err
    code, out, _ = chat_build(tmp_path, tok, capsys, [short, long, long], "--max-length", 40)
    assert (
        code == 0
        and "2 records left out, which keep no target within --max-length 40" in out
        and "record 1 (from 0)" in out
    )
    docs = read_tokens(tmp_path / "mm")
    assert len(docs) == 1 and (docs[0][1:] >= 0).any()


def test_verify_and_runs_say_that_nothing_is_learned(tmp_path, capsys):
    write_tokens(tmp_path / "r/en/a.bin", [[3], [-1, -2, -3], []])
    found = survey(tmp_path / "r", processes=1)
    assert (found.faults, found.targets, found.untaught) == ([], 0, 3) and found.first_untaught.endswith(
        "a.bin, line 1"
    )
    code, out, err = run(capsys, "verify", tmp_path / "r", "--processes", "1")
    assert code == 1 and "3 documents have no target" in out and "not a single target" in err
    for coord in (0, 1):
        with pytest.raises(TokenFileError, match="so nothing can be learned"):
            look_at(read_tokens(tmp_path / "r"), coord, 2)
    write_tokens(tmp_path / "r/en/a.bin", [[-1, -2], [-1, 5], [3]], overwrite=True)
    looks = [
        look_at(read_tokens(tmp_path / "r"), coord, 2) for coord in (0, 1)
    ]  # a rank without a target reads on, and agrees
    assert all(look.remarks for look in looks)
    code, out, _ = run(capsys, "verify", tmp_path / "r", "--processes", "1")
    assert code == 0 and "2 documents have no target" in out and "1 targets" in out


def test_a_tokenizer_without_begin_or_end(tmp_path, capsys):
    "No document begins with the id -1"
    trained = dict(
        sentence_iterator=iter(TEXTS * 40), vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / "nb"), bos_id=-1, eos_id=1, **trained)
    make(tmp_path / "a.txt", "the fox\n")
    code, out, _ = run(capsys, "build", tmp_path / "a.txt", tmp_path / "nb.bin", "--tokenizer", tmp_path / "nb.model")
    ids = read_tokens(tmp_path / "nb.bin")[0].tolist()
    assert code == 0 and min(ids) >= 0 and ids[-1] == 1 and "has no begin sign" in out
    trained["sentence_iterator"] = iter(TEXTS * 40)
    sentencepiece.SentencePieceTrainer.train(
        model_prefix=str(tmp_path / "ne"), bos_id=-1, eos_id=-1, normalization_rule_name="nmt_nfkc", **trained
    )
    code, out, _ = run(capsys, "build", tmp_path / "a.txt", tmp_path / "x/ne.bin", "--tokenizer", tmp_path / "ne.model")
    assert code == 0 and read_tokens(tmp_path / "x/ne.bin")[0].min() >= 0
    assert "has no end sign" in out and "does not keep line breaks, tabs, several spaces" in out


# --- builds that are cut off ------------------------------------------------------------------------------------------


def test_a_build_that_failed_goes_on(tmp_path, tok, capsys):
    for name, content in (("a", b"one\n"), ("b", b"good\n\xff\n"), ("c", b"two\n")):
        make(tmp_path / f"s/{name}.txt", content)
    argv = ("build", tmp_path / "s", tmp_path / "o", "--tokenizer", tok.path)
    assert run(capsys, *argv)[0] == 2
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        ".build.jsonl",
        "a.bin",
        "a.bin.meta",
        "tokenizer.model",
    ]
    first = (tmp_path / "o/a.bin").stat().st_mtime_ns
    make(tmp_path / "s/b.txt", "good\nmended\n")
    code, out, _ = run(capsys, *argv)
    assert code == 0 and out.count("left as it is") == 1 and (tmp_path / "o/a.bin").stat().st_mtime_ns == first
    assert len(read_tokens(tmp_path / "o")) == 4
    make(tmp_path / "s/a.txt", "another text\n")  # not what a.bin was made from
    code, _, err = run(capsys, *argv)
    assert code == 2 and "a.bin exists" in err and "from other sources, or in another way" in err
    assert run(capsys, *argv, "--no-eos")[0] == 2 and run(capsys, *argv, "--overwrite")[0] == 0


def test_a_build_that_was_killed_goes_on(tmp_path, tok):
    "SIGKILL in the middle of the second file"
    make(tmp_path / "s/a.txt", "one\n")
    make(tmp_path / "s/b.txt", "the quick brown fox\n" * 1_000_000)
    argv = [
        sys.executable,
        "-c",
        "from internlm_nb.apps.prepare import main; main()",
        "build",
        str(tmp_path / "s"),
        str(tmp_path / "o"),
        "--tokenizer",
        str(tok.path),
        "--processes",
        "2",
    ]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "o").glob(".b.bin.*.tmp")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "o/b.bin").exists() and list((tmp_path / "o").glob(".b.bin.*.tmp"))
    make(tmp_path / "s/b.txt", "two\n")
    made = build([tmp_path / "s"], tmp_path / "o", recipe(tok), 1, progress=False)
    assert [(p.name, b.documents, b.before) for p, b in made.items()] == [("a.bin", 1, True), ("b.bin", 1, False)]
    assert not list((tmp_path / "o").glob("*.tmp")) and not list((tmp_path / "o").glob(".*.tmp"))


def test_half_a_pair_of_this_very_build_is_made_anew(tmp_path, tok, capsys):
    "Killed between the two renamings: only the meta file is there"
    make(tmp_path / "s/a.txt", "one\n")
    argv = ("build", tmp_path / "s", tmp_path / "o", "--tokenizer", tok.path)
    assert run(capsys, *argv)[0] == 0
    record = tmp_path / "o/.build.jsonl"
    record.write_text(record.read_text().splitlines()[0] + '\n{"file": "a.b')  # begun, and the next line torn
    (tmp_path / "o/a.bin").unlink()
    assert run(capsys, *argv)[0] == 0 and len(read_tokens(tmp_path / "o")) == 1
    assert "left as it is" in run(capsys, *argv)[1]


def test_a_living_writers_file_is_not_swept(tmp_path, tok):
    make(tmp_path / "a.txt", "one\n")
    (tmp_path / "o").mkdir()
    with TokenWriter(tmp_path / "o/a.bin") as writer:
        writer.write([1, 2])
        with pytest.raises(FileExistsError):  # at its own end, since the build was faster
            build([tmp_path / "a.txt"], tmp_path / "o", recipe(tok), 1, progress=False)
            writer._finish()
        writer.overwrite = True
    assert read_tokens(tmp_path / "o/a.bin")[0].tolist() == [1, 2]


def test_no_main_guard_is_needed(tmp_path, tok):
    "In a plain script, with more than one process"
    for name in "ab":
        write_tokens(tmp_path / f"r/en/{name}.bin", [[1, 2, 3]] * 50)
    make(tmp_path / "t.txt", "the quick brown fox\n" * 3000)
    script = make(
        tmp_path / "plain.py",
        f"from internlm_nb.data.verify import verify\nfrom internlm_nb.data.build import Recipe, build\n"
        f"print(verify({str(tmp_path / 'r')!r}, processes=2))\nprint([b.documents for b in build([{str(tmp_path / 't.txt')!r}], {str(tmp_path / 't/en')!r}, Recipe({str(tok.path)!r}), 2).values()])\n",
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["[]", "[3000]"]), done.stderr


# --- tokenizers travel with the data ----------------------------------------------------------------------------------


def test_train_a_tokenizer_from_the_command_line(tmp_path, capsys):
    make(tmp_path / "s/a.txt", "\n".join(TEXTS))
    make(tmp_path / "s/b.jsonl.gz", gzip.compress(json.dumps({"text": TEXTS[0]}).encode()))
    argv = ("tokenizer", tmp_path / "s", tmp_path / "own.model", "--vocab-size", 320)
    code, out, _ = run(capsys, *argv)
    assert (
        code == 0
        and "320 pieces" in out
        and open_tokenizer(tmp_path / "own.model").decode(open_tokenizer(tmp_path / "own.model").encode("a fox"))
        == "a fox"
    )
    before = (tmp_path / "own.model").read_bytes()
    code, _, err = run(capsys, *argv)
    assert code == 2 and "own.model exists" in err and (tmp_path / "own.model").read_bytes() == before
    assert run(capsys, "tokenizer", tmp_path / "s", tmp_path / "own.bin")[0] == 2
    code, _, err = run(capsys, "tokenizer", tmp_path / "s", tmp_path / "big.model", "--vocab-size", 50000)
    assert code == 2 and "smaller vocab_size" in err and not (tmp_path / "big.model").exists()
    make(tmp_path / "chat.json", json.dumps([{"instruction": TEXTS[0], "output": TEXTS[1]}]))
    assert (
        run(capsys, "tokenizer", tmp_path / "chat.json", tmp_path / "c", "--vocab-size", 320, "--format", "chat")[0]
        == 0
    )
    assert (tmp_path / "c/tokenizer.model").is_file()


def test_the_tokenizer_lies_beside_the_files(tmp_path, toks, capsys):
    one, two = toks
    make(tmp_path / "s/a.txt", "the fox\n")
    make(tmp_path / "s/b.txt", "the dog\n")
    assert run(capsys, "build", tmp_path / "s/a.txt", tmp_path / "d/en", "--tokenizer", one.path)[0] == 0
    for root in ("d", "d/en", "d/en/a.bin"):
        found = find_tokenizer(tmp_path / root)
        assert found == tmp_path / "d/en/tokenizer.model" and tokenizer_fingerprint(found) == tokenizer_fingerprint(
            one.path
        )
    for dst in ("d/en", "d/en/b.bin"):  # another tokenizer into the same folder
        code, _, err = run(capsys, "build", tmp_path / "s/b.txt", tmp_path / dst, "--tokenizer", two.path)
        assert code == 2 and "a.bin was made with" in err and str(two.path) in err
    assert run(capsys, "build", tmp_path / "s/b.txt", tmp_path / "d/en", "--tokenizer", one.path)[0] == 0
    for dst in ("d/en/deep", "d/cn"):  # beside or within a type of the other one: it may be meant, so it is said
        code, out, _ = run(capsys, "build", tmp_path / "s/b.txt", tmp_path / dst, "--tokenizer", two.path)
        assert code == 0 and "was made with another tokenizer: a run cannot train on both" in out
    shutil.rmtree(tmp_path / "d/en/deep")
    with pytest.raises(ValueError, match="two tokenizers") as caught:
        find_tokenizer(tmp_path / "d")
    assert "cn/tokenizer.model" in str(caught.value) and "en/tokenizer.model" in str(caught.value)
    assert run(capsys, "verify", tmp_path / "d", "--processes", "1")[0] == 1
    code, out, _ = run(capsys, "show", tmp_path / "d/en/b.bin")  # no tokenizer named
    assert code == 0 and "the dog" in out
    assert (
        run(capsys, "decode", tmp_path / "d/en", tmp_path / "back.txt")[0] == 0
        and (tmp_path / "back.txt").read_text() == "the fox\nthe dog\n"
    )


def test_readers_do_not_see_the_extra_files(tmp_path, tok):
    "The types of the older system are all names under the root: nothing is put there"
    make(tmp_path / "a.txt", "the fox\n")
    build([tmp_path / "a.txt"], tmp_path / "d/en", recipe(tok), 1, progress=False)
    assert sorted(os.listdir(tmp_path / "d")) == ["en"]
    assert sorted(name for name in os.listdir(tmp_path / "d/en") if name.endswith((".bin", ".meta"))) == [
        "a.bin",
        "a.bin.meta",
    ]


def test_a_tokenizer_above_the_folder_is_found(tmp_path, toks, capsys):
    make(tmp_path / "s/a.txt", "the fox\n")
    write_tokens(tmp_path / "c/train/en/a.bin", [[1, 2]])
    make(tmp_path / "c/tokenizer.model", toks[0].path.read_bytes())
    assert (
        find_tokenizer(tmp_path / "c/train")
        == find_tokenizer(tmp_path / "c/train/en/a.bin")
        == tmp_path / "c/tokenizer.model"
    )
    assert find_tokenizer(tmp_path / "c/train/en") is None and find_tokenizer(tmp_path / "nowhere/train") is None
    # where somebody works, his own files stay as they are
    own = make(tmp_path / "w/tokenizer.model", toks[1].path.read_bytes())
    make(tmp_path / "w/a.txt", "the fox\n")
    code, out, _ = run(capsys, "build", tmp_path / "w/a.txt", tmp_path / "w/x.bin", "--tokenizer", toks[0].path)
    assert code == 0 and "no copy of the tokenizer is kept" in out and own.read_bytes() == toks[1].path.read_bytes()
    assert find_tokenizer(tmp_path / "w/x.bin") is None


def test_overwriting_with_another_tokenizer(tmp_path, toks, capsys):
    make(tmp_path / "s/a.txt", "the fox\n")
    for tok in toks:
        assert run(capsys, "build", tmp_path / "s", tmp_path / "d/en", "--tokenizer", tok.path, "--overwrite")[0] == 0
        assert find_tokenizer(tmp_path / "d").read_bytes() == tok.path.read_bytes()
    make(tmp_path / "s/a.txt", b"\xff\n")  # a failed overwriting leaves old ids: they are still the old tokenizer's
    assert run(capsys, "build", tmp_path / "s", tmp_path / "d/en", "--tokenizer", toks[0].path, "--overwrite")[0] == 2
    assert find_tokenizer(tmp_path / "d").read_bytes() == toks[1].path.read_bytes()


def test_json_tokenizers(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    fast.pre_tokenizer, fast.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        TEXTS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    (tmp_path / "j").mkdir()
    fast.save(str(tmp_path / "j/tokenizer.json"))
    make(tmp_path / "j/tokenizer_config.json", json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    make(tmp_path / "a.txt", "the quick brown fox\n" * 2000)
    for named in ("j", "j/tokenizer.json"):
        dst = tmp_path / named.replace("/", "-") / "en"
        code, out, err = run(
            capsys, "build", tmp_path / "a.txt", dst, "--tokenizer", tmp_path / named, "--processes", 2
        )
        assert code == 0 and "bytes a token" in out, err
        assert sorted(p.name for p in dst.iterdir()) == [
            ".build.jsonl",
            "a.bin",
            "a.bin.meta",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert find_tokenizer(dst.parent) == dst / "tokenizer.json"
        code, out, _ = run(capsys, "show", dst.parent, "--count", 1)
        assert code == 0 and "the quick brown fox" in out
        assert run(capsys, "verify", dst.parent, "--processes", 1)[0] == 0
    spelled = json.dumps(json.loads((tmp_path / "j/tokenizer.json").read_text()) | {"padding": None}, indent=7)
    other = make(tmp_path / "k/tokenizer.json", spelled).parent
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tmp_path / "j")  # without its begin and end
    make(other / "tokenizer_config.json", json.dumps({"eos_token": "</s>", "bos_token": {"content": "<s>"}}))
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tmp_path / "j")
    code, _, err = run(
        capsys, "build", tmp_path / "a.txt", tmp_path / "z", "--tokenizer", make(tmp_path / "l/tokenizer.json", "{")
    )
    assert code == 2 and "tokenizer.json" in err
    # the id 0 is a sign of its own here, which cannot be marked as read only
    make(tmp_path / "m.json", json.dumps([{"instruction": "x", "output": "y"}]))
    assert (
        run(
            capsys,
            "build",
            tmp_path / "m.json",
            tmp_path / "m/x",
            "--tokenizer",
            tmp_path / "j",
            "--format",
            "chat",
            "--template",
            "v2",
        )[0]
        == 0
    )


def test_held_out_documents(tmp_path, tok, capsys):
    lines = [f"document {i}" for i in range(500)]
    make(tmp_path / "s/a.txt", "\n".join(lines[:250]))
    make(tmp_path / "s/b.txt", "\n".join(lines[250:] + lines[:250]))  # every line of a once more
    code, out, _ = run(
        capsys,
        "build",
        tmp_path / "s",
        tmp_path / "d/en",
        "--tokenizer",
        tok.path,
        "--valid-share",
        0.1,
        "--processes",
        2,
    )
    assert code == 0 and "documents held out" in out
    train, valid = ({tok.decode(d) for d in read_tokens(tmp_path / name)} for name in ("d", "d-valid"))
    assert (
        train | valid == set(lines)
        and not train & valid
        and valid == {line for line in lines if is_held_out(line, 0.1)}
    )
    assert 25 < len(valid) < 80
    assert find_tokenizer(tmp_path / "d-valid") == tmp_path / "d-valid/en/tokenizer.model"
    code, out, _ = run(
        capsys, "build", tmp_path / "s", tmp_path / "d/en", "--tokenizer", tok.path, "--valid-share", 0.1
    )
    assert code == 0 and out.count("left as it is") == 2
    code, out, _ = run(
        capsys,
        "build",
        tmp_path / "s/a.txt",
        tmp_path / "e/en/all.bin",
        "--tokenizer",
        tok.path,
        "--valid-share",
        0.1,
        "--valid-dst",
        tmp_path / "h/en/all.bin",
    )
    assert code == 0 and read_tokens(tmp_path / "h").types == ["en"]
    for share in (-0.1, 1.0, 7):
        assert (
            run(capsys, "build", tmp_path / "s", tmp_path / "f/en", "--tokenizer", tok.path, "--valid-share", share)[0]
            == 2
        )
    code, out, _ = run(
        capsys, "build", tmp_path / "s/a.txt", tmp_path / "g/en", "--tokenizer", tok.path, "--valid-share", 1e-12
    )
    assert code == 0 and "none of 250 documents was held out" in out
    assert [str(held_out_beside(d)) for d in ("d/train/en", "en", "/x/en/a.bin", "a.bin")] == [
        "d/valid/en",
        "en-valid",
        "/x-valid/en/a.bin",
        "valid/a.bin",
    ]


# --- is it the same data? ---------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cn/a", "en/b", "en/c"):
        write_tokens(tmp_path / f"data/{name}.bin", [rng.integers(10, 99, n) for n in rng.integers(2, 40, 300)])
    return tmp_path / "data"


def exchange(path):
    "Other ids of the same lengths in as many bytes"
    write_tokens(path, [np.where(d < 98, d + 1, 10) for d in read_tokens(path)], overwrite=True)


def swap(path):
    "Two documents change places"
    rows = [d.tolist() for d in read_tokens(path)]
    write_tokens(path, [rows[1], rows[0], *rows[2:]], overwrite=True)


CHANGES = {
    "other content": (lambda root: exchange(root / "en/b.bin"), "en/b.bin has other content"),
    "order": (lambda root: swap(root / "en/c.bin"), "en/c.bin has other content"),
    "a name": (
        lambda root: [(root / f"cn/a.bin{e}").rename(root / f"cn/z.bin{e}") for e in ("", ".meta")],
        "cn/a.bin is not there: cn/z.bin has its content",
    ),
    "a type": (lambda root: (root / "cn").rename(root / "zh"), "cn/a.bin is not there: zh/a.bin has its content"),
    "one more": (lambda root: write_tokens(root / "en/d.bin", [[1, 2]]), "en/d.bin was not there when"),
    "one less": (lambda root: [(root / f"en/c.bin{e}").unlink() for e in ("", ".meta")], "en/c.bin is not there"),
    "an end": (
        lambda root: write_tokens(root / "en/c.bin", [d for d in read_tokens(root / "en/c.bin")][:-1], overwrite=True),
        "en/c.bin has other content",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_are_named(data, name):
    change, says = CHANGES[name]
    before = json.loads(json.dumps(folder_facts(data)))  # as a checkpoint keeps it
    assert differences([before], [folder_facts(data)]) == []
    change(data)
    lines = differences([before], [folder_facts(data)], ["DATA"])
    assert len(lines) == 1 and lines[0].startswith("DATA holds other data") and says in lines[0]


def test_facts_of_a_moved_folder_and_of_older_checkpoints(data):
    before = folder_facts(data)
    moved = data.rename(data.with_name("elsewhere"))
    now = folder_facts(moved)
    assert now == before
    counts = {key: before[key] for key in ("documents", "tokens")}
    assert differences([counts], [now]) == [] and differences([], []) == []
    assert (
        "900 documents, 18,917 tokens (899, 18,917 on rank 0)"
        in differences([counts | {"documents": 899}], [now], ["DATA"], "on rank 0")[0]
    )
    assert differences([counts], []) == ["there are 0 folders of data, but 1 when the checkpoint was made"]
    exchange(moved / "en/b.bin")
    assert differences([counts], [folder_facts(moved)]) == []  # all that the older ones know is equal


def test_many_files_are_named_by_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("internlm_nb.data.facts._MOST_PARTS", 5)
    for i in range(8):
        write_tokens(tmp_path / f"d/t{i % 2}/{i}.bin", [[1, 2]])
    before = folder_facts(tmp_path / "d")
    assert set(before["parts"]) == {"t0/", "t1/"}
    write_tokens(tmp_path / "d/t1/3.bin", [[1, 3]], overwrite=True)
    assert "t1/ has other content" in differences([before], [folder_facts(tmp_path / "d")])[0]


def test_the_loader_knows_the_facts_of_all_folders(data, tmp_path):
    write_tokens(tmp_path / "held/en/v.bin", [[1, 2, 3]] * 20)
    config = DataConfig(
        train_folder=(f"{data}=2", f"{data / 'en'}=1"),
        valid_folder=str(tmp_path / "held"),
        seq_len=16,
        micro_num=1,
        min_length=3,
    )
    loader, validation = Loader(config, 0, 100), make_validation(config, 100)
    assert [f["files"] for f in loader.facts()] == [3, 2] and validation.facts()[0]["documents"] == 20
    assert loader.facts()[0]["documents"] == len(read_tokens(data, 3)) < len(read_tokens(data))
    assert Loader(DataConfig(seq_len=16), 0, 100).facts() == [] == make_validation(DataConfig(seq_len=16), 100).facts()


def test_a_broken_document_names_its_batch_and_the_way_on(data):
    config = DataConfig(train_folder=(str(data),), seq_len=64, micro_num=1, skip_batches="1", prefetch=2)
    path = data / "en/b.bin"
    path.write_bytes(path.read_bytes().replace(b"]}\n", b"}}\n"))
    with pytest.raises(TokenFileError) as caught:
        for _ in Loader(config, 0, 100).iterate(0, 40):
            pass
    error = caught.value
    batch = int(str(error).rpartition("--data.skip-batches 1,")[2].rstrip(")"))
    assert error.path == str(path) and error.line and "mend it there" in str(error)
    skipping = Loader(replace(config, skip_batches=f"1,{batch}"), 0, 100)
    step = batch - 1 if batch > 1 else batch  # batch 1 is left out as well
    with pytest.raises(TokenFileError, match=f"skip-batches 1,{batch},"):  # the next one, not the same again
        for _ in skipping.iterate(step, 40):
            pass

"Laws of token files: round trips, faults with an address, atomic writes, flat memory"

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.data.tokenfiles import Kept, TokenWriter, read_tokens, write_tokens
from internlm_nb.data.tokenline import TokenFileError, parse_line, token_line, token_lines
from internlm_nb.data.verify import verify

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
IDS = st.lists(st.integers(-(2**31) + 1, 2**31 - 1), max_size=30)


@SETTINGS
@given(IDS)
def test_line_is_json_dumps(ids):
    "The line is byte for byte what json.dumps writes, and is read back by the fast and by the careful way"
    line = token_line(ids)
    assert line == json.dumps({"tokens": ids}).encode() + b"\n"
    assert parse_line(line).tolist() == ids
    assert (
        parse_line(json.dumps({"id": 3, "tokens": ids}, indent=None, separators=(",", ":")).encode() + b"\n").tolist()
        == ids
    )


@SETTINGS
@given(st.binary(max_size=40), st.integers(0, 30), st.booleans())
def test_no_broken_line_is_read_as_a_good_one(noise, at, inside):
    "A line is read only when json reads it to the same integers (NumPy's reader alone would let much through)"
    good = b'{"tokens": [1, 22, -333]}\n'
    line = good[:at] + noise + good[at:] if inside else b'{"tokens": [' + noise + b"]}\n"
    try:
        ids = parse_line(line).tolist()
    except ValueError:
        return
    # leading zeros are the one thing that is forgiven: json knows no 007
    assert ids == json.loads(line)["tokens"] or b"0" in line


@pytest.mark.parametrize(
    "body",
    [
        b"1 2",
        b"1,,2",
        b"1, 2,",
        b",1",
        b"1, - 2",
        b"--1",
        b"1-2",
        b" 1 2",
        b"-",
        b" -",
        b"1, 2.0",
        b"99999999999999999999999",
        b"4294967296",
        b"1e3",
        b"true",
        b'"1"',
        b"[1]",
    ],
)
def test_lines_that_must_fail(body):
    with pytest.raises(ValueError):
        parse_line(b'{"tokens": [' + body + b"]}\n")


@SETTINGS
@given(
    st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=9),
    st.lists(st.integers(0, 99), max_size=2),
    st.lists(st.integers(0, 99), max_size=2),
)
def test_fast_lines_are_the_same(rows, before, behind):
    assert "".join(token_lines(rows, 100, before, behind)).encode() == b"".join(
        token_line([*before, *row, *behind]) for row in rows
    )


@settings(SETTINGS, max_examples=25)
@given(st.lists(IDS, min_size=1, max_size=20))
def test_round_trip(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("t") / "en" / "a.bin"
    write_tokens(path, documents)
    raw = path.read_bytes()
    assert raw == b"".join(json.dumps({"tokens": d}).encode() + b"\n" for d in documents)
    rows = np.load(f"{path}.meta")
    lines = raw.splitlines(keepends=True)
    assert rows.dtype == np.int64 and rows.flags.c_contiguous
    assert rows.tolist() == [[sum(map(len, lines[:i])), len(d)] for i, d in enumerate(documents)]
    assert [d.tolist() for d in read_tokens(path.parent.parent)] == documents
    assert verify(path.parent.parent, processes=1) == []


def test_worked_offsets(tmp_path):
    "Lines of 16, 24 and 17 tokens, the first two 110 and 152 bytes long"

    def sized(count, size):
        digits = size - len('{"tokens": []}\n') - 2 * (count - 1)
        return [10 ** (digits // count - 1 + (i < digits % count)) for i in range(count)]

    write_tokens(tmp_path / "a.bin", [sized(16, 110), sized(24, 152), sized(17, 99)])
    assert np.load(tmp_path / "a.bin.meta").tolist() == [[0, 16], [110, 24], [262, 17]]
    np_saved = tmp_path / "expected.npy"
    np.save(np_saved, np.array([[0, 16], [110, 24], [262, 17]], dtype=np.int64))
    assert (tmp_path / "a.bin.meta").read_bytes() == np_saved.read_bytes()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("columns", [2, 3])
def test_older_meta_files(tmp_path, dtype, columns):
    "int32 or int64; a third column (a running index) is not a length"
    documents = [[5] * n for n in (3, 1, 4)]
    write_tokens(tmp_path / "en" / "a.bin", documents)
    meta = tmp_path / "en" / "a.bin.meta"
    rows = np.column_stack([np.load(meta), np.arange(3)[::-1]])[:, :columns].astype(dtype)
    with open(meta, "wb") as file:
        np.save(file, rows)
    docs = read_tokens(tmp_path)
    assert docs.lengths.tolist() == [3, 1, 4] and [d.tolist() for d in docs] == documents and docs[0].dtype == np.int64


def test_types_order_and_slices(tmp_path):
    for i, name in enumerate(("en/b/z", "en/a", "cn/x/y/w", "code/k")):
        write_tokens(tmp_path / f"{name}.bin", [[i] * 2, [i] * 3])
    (tmp_path / "en" / "notes.txt").write_text("not a token file")
    docs = read_tokens(tmp_path)
    assert docs.types == ["cn", "code", "en"] and docs.type_ids.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [int(d[0]) for d in docs] == [2, 2, 3, 3, 1, 1, 0, 0]
    assert [len(d) for d in docs[1:5:2]] == [3, 3] and docs[-1].tolist() == [0, 0, 0] and len(docs[5:99]) == 3
    assert docs.num_tokens == 20 and docs.length_of(np.array([7, 0, 3])).tolist() == [3, 2, 3]
    assert docs.type_of(np.array([7, 0, 3])).tolist() == [2, 0, 1]
    for index in (8, -9):
        with pytest.raises(IndexError):
            docs[index]
    again = pickle.loads(pickle.dumps(docs))
    assert [d.tolist() for d in again] == [d.tolist() for d in docs]


@SETTINGS
@given(st.lists(st.integers(0, 12), min_size=1, max_size=400), st.integers(1, 12))
def test_kept_selects(lengths, least):
    rows = np.stack([np.arange(len(lengths)), lengths], 1)
    expected = np.flatnonzero(np.asarray(lengths) >= least)
    kept = Kept(rows, least)
    assert len(kept) == len(expected)
    shuffled = np.random.default_rng(0).permutation(len(expected))
    assert kept.select(shuffled).tolist() == expected[shuffled].tolist()


def test_min_length_over_several_files(tmp_path):
    rng = np.random.default_rng(0)
    everything = []
    for name in "abc":
        documents = [[1] * int(n) for n in rng.integers(0, 9, 200)]
        write_tokens(tmp_path / "en" / f"{name}.bin", documents)
        everything += documents
    docs = read_tokens(tmp_path, min_length=5)
    assert [len(d) for d in docs] == docs.lengths.tolist() == [len(d) for d in everything if len(d) >= 5]
    assert docs.num_tokens == docs.lengths.sum()


def test_more_files_than_may_be_open(tmp_path):
    "Files are opened as they are needed: far more of them than the process may have descriptors"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for i in range(400):
        write_tokens(tmp_path / "en" / f"{i:03}.bin", [[i, i]])
    code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (600, {hard}))\nfrom internlm_nb.data.tokenfiles import read_tokens\n"
    code += f"docs = read_tokens({str(tmp_path)!r})\nassert [int(d[0]) for d in docs] == list(range(400)) and int(docs[0][0]) == 0\nassert len(docs.lengths) == 400"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_tokens(tmp_path / "en" / "a.bin", [[i + 1] * 6 for i in range(9)])
    return tmp_path


def spoil(path, old, new, count=1):
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, count))


def rewrite(meta, change):
    rows = np.load(meta).copy()
    rows = change(rows)
    with open(meta, "wb") as file:
        np.save(file, rows)


def put(row, column, value):
    def change(rows):
        rows[row, column] = value
        return rows

    return change


FAULTS = {
    # name: (how to break folder/en/a.bin, (file, line) of the fault, words)
    "bad json": (lambda p, m: spoil(p, b"4, 4]", b"4, 4 "), ("a.bin", 4), "bad json"),
    "a letter": (lambda p, m: spoil(p, b"4, 4]", b"4, x]"), ("a.bin", 4), "bad json"),
    "not tokens": (lambda p, m: spoil(p, b'{"tokens": [5,', b'{"tokenz": [5,'), ("a.bin", 5), 'under the key "tokens"'),
    "a float": (lambda p, m: spoil(p, b"5, 5, 5]", b"5,  5.0]"), ("a.bin", 5), "must be integers"),
    "count": (lambda p, m: rewrite(m, put(6, 1, 7)), ("a.bin", 7), "6 tokens, but the meta file says 7"),
    "offset in a line": (lambda p, m: rewrite(m, put(3, 0, np.load(m)[3, 0] + 2)), ("a.bin", 3), "not one line"),
    "offset backwards": (lambda p, m: rewrite(m, put(3, 0, np.load(m)[1, 0])), ("a.bin.meta", 3), "do not follow"),
    "offset first": (lambda p, m: rewrite(m, put(0, 0, 1)), ("a.bin.meta", 1), "should start at byte 0"),
    "meta too short": (lambda p, m: rewrite(m, lambda rows: rows[:-1]), ("a.bin", 8), "not one line"),
    "meta too long": (lambda p, m: rewrite(m, lambda rows: np.vstack([rows, [10**6, 3]])), ("a.bin", 10), "truncated"),
    "negative count": (lambda p, m: rewrite(m, put(2, 1, -1)), ("a.bin.meta", 3), ""),
    "truncated in a line": (lambda p, m: p.write_bytes(p.read_bytes()[:-5]), ("a.bin", 9), "truncated"),
    "truncated at a line": (
        lambda p, m: p.write_bytes(b"".join(p.read_bytes().splitlines(True)[:7])),
        ("a.bin", 9),
        "truncated",
    ),
    "empty": (lambda p, m: p.write_bytes(b""), ("a.bin", None), "empty"),
    "no meta": (lambda p, m: m.unlink(), ("a.bin.meta", None), "missing"),
    "no bin": (lambda p, m: p.unlink(), ("en", None), ""),
    "meta is no array": (lambda p, m: m.write_bytes(b"something else"), ("a.bin.meta", None), "not a readable .npy"),
    "meta truncated": (lambda p, m: m.write_bytes(m.read_bytes()[:150]), ("a.bin.meta", None), "not a readable .npy"),
    "meta empty": (lambda p, m: m.write_bytes(b""), ("a.bin.meta", None), "not a readable .npy"),
    "meta of floats": (
        lambda p, m: rewrite(m, lambda rows: rows.astype(float)),
        ("a.bin.meta", None),
        "int32 or int64",
    ),
    "meta of four columns": (
        lambda p, m: rewrite(m, lambda rows: np.hstack([rows, rows])),
        ("a.bin.meta", None),
        "int32 or int64",
    ),
    "meta without rows": (lambda p, m: rewrite(m, lambda rows: rows[:0]), ("a.bin.meta", None), "no rows"),
    "id too large": (
        lambda p, m: spoil(p, b"8, 8, 8]", b"8, 8,99]"),
        ("a.bin", 8),
        "token id 99 is outside the vocabulary of 50",
    ),
    "negative id too large": (lambda p, m: spoil(p, b"8, 8, 8]", b"8,8,-99]"), ("a.bin", 8), "token id 99 is outside"),
    "a line too many": (
        lambda p, m: p.write_bytes(p.read_bytes() + b'{"tokens": [1]}\n'),
        ("a.bin", 9),
        "not one line",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(folder, name):
    "By reading (at the latest when the document is read) and by verify, with file and line"
    breaks, (file, line), words = FAULTS[name]
    path = folder / "en" / "a.bin"
    breaks(path, folder / "en" / "a.bin.meta")
    with pytest.raises(TokenFileError) as caught:
        for _ in read_tokens(folder, vocab_size=50):
            pass
    if name != "no bin":
        assert (os.path.basename(caught.value.path), caught.value.line) == (file, line) and words in str(caught.value)
    faults = verify(folder, vocab_size=50, processes=1)
    assert faults
    if name != "no bin":
        assert (file, line) in [(os.path.basename(f.path), f.line) for f in faults]


def test_empty_folder(tmp_path):
    with pytest.raises(TokenFileError, match=r"no \.bin files"):
        read_tokens(tmp_path)
    assert len(verify(tmp_path)) == 1
    with pytest.raises(FileNotFoundError):
        read_tokens(tmp_path / "nowhere")


def test_verify_in_processes_lists_all(tmp_path, monkeypatch):
    import internlm_nb.data.verify as verify_module

    monkeypatch.setattr(verify_module, "_STRETCH", 10)
    for name in ("cn/a", "en/b"):
        write_tokens(tmp_path / f"{name}.bin", [[7] * 4] * 35)
    rewrite(tmp_path / "cn" / "a.bin.meta", put(3, 1, 5))
    rewrite(tmp_path / "en" / "b.bin.meta", put(33, 1, 5))
    spoil(tmp_path / "en" / "b.bin", b"7, 7]", b"7, 9]")
    expected = [("a.bin", 4), ("b.bin", 1), ("b.bin", 34)]
    for processes in (1, 2):
        assert [(os.path.basename(f.path), f.line) for f in verify(tmp_path, 9, processes)] == expected


# --- writing ----------------------------------------------------------------------------------------------------------


def test_refuses_and_overwrites(tmp_path):
    path = write_tokens(tmp_path / "a.bin", [[1]])
    with pytest.raises(FileExistsError, match="exists"):
        write_tokens(path, [[2]])
    assert [d.tolist() for d in read_tokens(path)] == [[1]]
    write_tokens(path, [[2], [3]], overwrite=True)
    assert [d.tolist() for d in read_tokens(path)] == [[2], [3]]
    path.unlink()  # a meta file alone is not overwritten either
    with pytest.raises(FileExistsError):
        write_tokens(path, [[2]])
    with pytest.raises(ValueError, match=r"must end in \.bin"):
        write_tokens(tmp_path / "a.jsonl", [[1]])


def test_failure_leaves_nothing(tmp_path):
    def failing():
        yield [1]
        raise KeyboardInterrupt

    for documents, error in ((failing(), KeyboardInterrupt), ([], ValueError), ([[1], None], TypeError)):
        with pytest.raises(error):
            write_tokens(tmp_path / "a.bin", documents)
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(FileExistsError), TokenWriter(tmp_path / "a.bin") as writer:
        writer.write([1])
        write_tokens(tmp_path / "a.bin", [[2]])
    assert [d.tolist() for d in read_tokens(tmp_path / "a.bin")] == [[2]]


def test_killed_writer_leaves_nothing_half(tmp_path):
    "SIGKILL in the middle: the old file is whole, no new one is there"
    write_tokens(tmp_path / "en" / "old.bin", [[1, 2, 3]])
    code = """
from internlm_nb.data.tokenfiles import write_tokens
def endless():
    n = 0
    while True:
        n += 1
        if n == 50_000: print("writing", flush=True)
        yield [n] * 9
import sys
write_tokens(sys.argv[1], endless(), overwrite=True)
"""
    for name in ("old", "new"):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "en" / f"{name}.bin")], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sorted(p.name for p in (tmp_path / "en").iterdir() if p.suffix != ".tmp") == ["old.bin", "old.bin.meta"]
    docs = read_tokens(tmp_path)
    assert [d.tolist() for d in docs] == [[1, 2, 3]] and verify(tmp_path, processes=1) == []


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_stays_flat(tmp_path):
    "Reading 39 MB in 180 000 documents costs less than 25 MB of resident memory, mapped pages included: a list of arrays would need 70 MB, the file's pages 39"
    rng = np.random.default_rng(0)
    lines = [token_line(rng.integers(1, 60000, n)) for n in rng.integers(20, 32, 3000)]
    counts = [line.count(b",") + 1 for line in lines]
    with TokenWriter(tmp_path / "en" / "a.bin") as writer:
        for _ in range(60):
            writer.write_lines(b"".join(lines), [len(line) for line in lines], counts)
    assert (tmp_path / "en" / "a.bin").stat().st_size > 30e6
    code = f"""
import numpy as np, os
from internlm_nb.data.order import ShuffledPacks
from internlm_nb.data.tokenfiles import read_tokens
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
read_tokens({str(tmp_path)!r})[0]; ShuffledPacks(read_tokens({str(tmp_path)!r}), 0, 4096, 4)[3]
before = resident()
docs = read_tokens({str(tmp_path)!r})
peak = resident()
packs = ShuffledPacks(docs, 0, 4096, 4)
for i in range(0, packs.packs_per_epoch, 3):  # a third of the documents, and nearly all pages
    packs[i]
    peak = max(peak, resident())
print((peak - before) / 1e6)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from /proc")
    started = time.perf_counter()
    grown = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    print(f"{grown:.1f} MB, {time.perf_counter() - started:.1f} s")
    assert grown < 25, f"{grown:.1f} MB"

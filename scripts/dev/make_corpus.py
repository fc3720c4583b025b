"""Make the embedded corpus from its sources.  make_corpus.py SOURCES DST

SOURCES holds en/*.md, en/tinyshakespeare.txt, cn/*.txt and code/*.jsonl (see internlm_nb/corpus/SOURCES.md); DST gets one TYPE.jsonl.xz a type, a document a line.
The same sources give the same bytes.
"""

import json
import lzma
import re
import sys
from pathlib import Path

PIECE = 4000  # characters of a piece of a longer text, about
BUDGET = {
    "tinyshakespeare.txt": 450_000,
    "Moby_Dick.md": 620_000,
    "song_ci.txt": 560_000,
}  # characters taken from the start of the long sources
CODE_BYTES = 2_300_000


def pieces(text, join):
    "A text cut at blank lines (or lines) into pieces of about PIECE characters"
    out, block = [], []
    for paragraph in text.split(join):
        block.append(paragraph)
        if sum(map(len, block)) >= PIECE:
            out.append(join.join(block).strip("\n") + "\n")
            block = []
    rest = join.join(block).strip("\n")
    if len(rest) > PIECE // 4 or not out:
        out.append(rest + "\n")
    elif rest:
        out[-1] += join + rest + "\n"
    return [piece for piece in out if piece.strip()]


def books(root):
    for name in ("Frankenstein.md", "Pride_and_Prejudice.md", "Moby_Dick.md"):
        body = (root / "en" / name).read_text(encoding="utf-8").split("-------", 1)[1][: BUDGET.get(name)]
        for chapter in re.split(r"\n(?=## )", body):
            for piece in pieces(chapter.strip("\n"), "\n\n"):
                yield name.removesuffix(".md"), piece
    body = (root / "en" / "tinyshakespeare.txt").read_text(encoding="utf-8")[: BUDGET["tinyshakespeare.txt"]]
    for piece in pieces(body[: body.rindex("\n\n")], "\n\n"):
        yield "tinyshakespeare", piece


def classics(root):
    text = (root / "cn" / "lunyu_mengzi.txt").read_text(encoding="utf-8")
    for chapter in text.strip("\n").split("\n\n"):
        for piece in pieces(chapter, "\n"):
            yield "lunyu_mengzi", piece
    text = (root / "cn" / "song_ci.txt").read_text(encoding="utf-8")[: BUDGET["song_ci.txt"]]
    for poem in text[: text.rindex("\n\n")].strip("\n").split("\n\n"):
        yield "song_ci", poem.strip("\n") + "\n"


def modules(root):
    records = [
        json.loads(line) for path in sorted((root / "code").glob("*.jsonl")) for line in path.open(encoding="utf-8")
    ]
    chosen, total = [], 0
    for record in sorted(
        records, key=lambda r: len(r["text"])
    ):  # the small and middling ones: many styles rather than a few giants
        # a module with a copyright line of its own may have a licence of its own; sysconfig data is of one machine
        others = re.search("(?i)copyright", record["text"]) or "_sysconfigdata" in record["path"]
        if len(record["text"]) >= 1500 and total < CODE_BYTES and not others:
            chosen.append(record)
            total += len(record["text"].encode())
    for record in sorted(chosen, key=lambda r: r["path"]):
        yield record["path"], record["text"]


def main():
    root, dst = map(Path, sys.argv[1:3])
    for kind, documents in (("en", books(root)), ("cn", classics(root)), ("code", modules(root))):
        seen, lines = set(), []
        for source, text in documents:
            if text not in seen:  # a poem may be handed down twice
                seen.add(text)
                lines.append(json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n")
        raw = "".join(lines).encode()
        packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
        (dst / f"{kind}.jsonl.xz").write_bytes(packed)
        print(f"{kind}: {len(lines)} documents, {len(raw):,} bytes, stored {len(packed):,}")


if __name__ == "__main__":
    main()

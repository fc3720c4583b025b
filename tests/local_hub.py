"""What needs files that are not in the repository: python tests/local_hub.py --tokenizers FILE.model … --corpus FOLDER [--model HF_FOLDER --text FILE …]

--tokenizers: each is exported, and every text of --corpus (.txt, .md, and the "text" of .jsonl) is cut by SentencePiece, by the tokenizers package and by transformers;
              counts the segments that differ, and checks that each mark is one id.
--model:      perplexity of a Hugging Face folder through from_hf, in its own dtype, 4 windows of 1024 tokens from the start of each --text.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from internlm_nb.data.tokenizer import Tokenizer
from internlm_nb.hub.hf_tokenizer import write_tokenizer
from internlm_nb.hub.huggingface import from_hf


def segments(corpus: Path):
    "Texts of a folder: whole documents of jsonl, paragraphs and lines of text"
    for path in sorted(p for p in corpus.rglob("*") if p.suffix in (".txt", ".md", ".jsonl")):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            yield path.name, [json.loads(line)["text"] for line in text.splitlines()]
        else:
            yield path.name, [p for p in text.split("\n\n") if p] + text.split("\n")


def check_tokenizer(file: Path, corpus: Path) -> int:
    "Segments that are cut differently"
    tokenizer, wrong = Tokenizer(file), 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_tokenizer(tokenizer, folder)
        print(f"{file.name}: {tokenizer.vocab_size} pieces, exported in {time.perf_counter() - start:.1f} s")
        theirs = AutoTokenizer.from_pretrained(folder)
    fast = theirs.backend_tokenizer
    # names of other special pieces stand for them in every Hugging Face tokenizer, and for themselves in SentencePiece
    marks = {tokenizer.id_to_piece(i) for i in (0, 1, 2)} | {piece for piece in tokenizer.marks}
    for name, texts in segments(corpus):
        plain = [t for t in texts if "\0" not in t and not any(m in t for m in marks)]
        expected = tokenizer.sp.encode(plain, num_threads=1)
        found = [e.ids for e in fast.encode_batch(plain, add_special_tokens=False)]
        through = theirs(plain[:500], add_special_tokens=False)["input_ids"]
        different = sum(a != b for a, b in zip(expected, found)) + sum(a != b for a, b in zip(expected, through))
        back = sum(theirs.decode(a, clean_up_tokenization_spaces=False) != t for a, t in zip(expected[:500], plain))
        print(
            f"  {name:32} {len(plain):7} segments ({len(texts) - len(plain)} with marks left out) {sum(map(len, expected)):9} tokens: {different} cut differently, {back} decoded differently"
        )
        wrong += different + back
    for mark, id in tokenizer.marks.items():
        wrong += theirs(mark, add_special_tokens=False)["input_ids"] != [id]
        wrong += theirs(f"a{mark}b", add_special_tokens=False)["input_ids"] != [
            *tokenizer.sp.encode("a"),
            id,
            *tokenizer.sp.encode("b"),
        ]
    print(f"  marks, each one id: {', '.join(f'{m} {i}' for m, i in tokenizer.marks.items())}")
    return wrong


@torch.no_grad()
def check_model(folder: Path, texts: list[Path]) -> None:
    "Print perplexities"
    model, tokenizer = from_hf(folder)
    for path in texts:
        ids = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")[:60_000])[:4096]).view(4, 1024)
        loss = sum(F.cross_entropy(model(row)[:-1].float(), row[1:], reduction="sum").item() for row in ids)
        print(f"{path.name}: {math.exp(loss / (4 * 1023)):.2f} in {model.embedding.weight.dtype}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", type=Path, nargs="*", default=[])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    bad = sum(check_tokenizer(file, args.corpus) for file in args.tokenizers)
    if args.model:
        check_model(args.model, args.text)
    sys.exit(f"{bad} differences" if bad else 0)

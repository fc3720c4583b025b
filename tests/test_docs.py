"What readers meet first is true: links lead somewhere, reading orders are whole, both READMEs have the same commands, and no page speaks of a machine"

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
READMES = ["README.md", "README.zh.md"]
LINK = re.compile(r"!?\[(?:[^\]\\]|\\.)*\]\(\s*<?([^)\s>]+)>?[^)]*\)|<(?:a|img)\s[^>]*?(?:href|src)=[\"']([^\"']+)")


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def shown(cell: dict) -> str:
    "The text of a cell that is markdown: its source, or what its code displays as such"
    if cell["cell_type"] == "markdown":
        return "".join(cell["source"])
    return "\n".join("".join(o.get("data", {}).get("text/markdown", [])) for o in cell.get("outputs", []))


def prose(text: str) -> str:
    "Without code, in which brackets mean other things"
    text = re.sub(r"^(```+|~~~+).*?^\1\s*$", "", text, flags=re.M | re.S)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def links(text: str) -> list[str]:
    return [a or b for a, b in LINK.findall(prose(text))]


def anchors(text: str) -> set[str]:
    "What # may name in a page: its headings as Jupyter spells them and as GitHub does"
    titles = re.findall(r"^#+\s+(.*?)\s*$", prose(text), flags=re.M)
    return {t.replace(" ", "-") for t in titles} | {
        re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles
    }


def page(path: Path) -> str:
    return "\n\n".join(map(shown, cells(path))) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


def dead_links(path: Path, base: Path) -> list[str]:
    "Relative links of a page that lead to no file, or to no heading of their page"
    out = []
    for link in links(page(path)):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        file, _, anchor = link.partition("#")
        target = base / unquote(file) if file else path
        if not target.exists():
            out.append(f"{link}: no such file")
        elif anchor and target.suffix in (".ipynb", ".md") and unquote(anchor) not in anchors(page(target)):
            out.append(f"{link}: no such heading")
    return out


def test_links_are_seen():
    "The tests below would be empty if the pattern found nothing"
    text = 'see [a](x/y.ipynb#Part-one), ![b](c.png "t"), <a href="d.md">d</a>, `[e](f)` and\n```\n[g](h)\n```\n[i](<j.md>)'
    assert links(text) == ["x/y.ipynb#Part-one", "c.png", "d.md", "j.md"]
    assert "Fifteen-notebooks" in anchors("# One\n\n## Fifteen notebooks\n")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_links_of_notebooks(path):
    assert not dead_links(path, path.parent)


@pytest.mark.parametrize("name", READMES)
def test_links_of_readmes(name):
    assert not dead_links(ROOT / name, ROOT)


@pytest.mark.parametrize(
    "folder", sorted(p for p in NBS.iterdir() if p.is_dir() and not p.name.startswith(".")), ids=lambda p: p.name
)
def test_reading_order(folder):
    "Numbers go from 00 without a gap; the overview links to every notebook of its folder, each first time in that order"
    names = sorted(p.name for p in folder.glob("*.ipynb"))
    assert [n[:3] for n in names] == [f"{i:02}_" for i in range(len(names))]
    assert names[0] == f"00_{folder.name}.ipynb"
    linked = dict.fromkeys(link.partition("#")[0] for link in links(page(folder / names[0])))
    assert [n for n in linked if n in names[1:]] == names[1:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_a_title_and_a_subtitle(path):
    first = next(c for c in cells(path) if c["cell_type"] == "markdown")
    lines = [line for line in "".join(first["source"]).splitlines() if line.strip()]
    assert lines[0].startswith("# ")
    assert lines[1].startswith("> ")


def test_the_tour_names_fifteen():
    table = page(NBS / "tour.ipynb").split("## Fifteen notebooks to read first")[1]
    rows = re.findall(r"^\| *(\d+) \| \[[^\]]+\]\(([^)]+)\) \| [^|]+ \|$", table, flags=re.M)
    assert [int(n) for n, _ in rows] == list(range(1, 16))
    assert len({target for _, target in rows}) == 15


def code_lines(source: str) -> int:
    "Without blanks, comments and docstrings"
    lines = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        first = node.body[0] if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            lines -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(lines)


def test_the_table_of_modules_is_the_modules():
    "Docstrings of the saved table word for word; lines of code about right, so that a small change needs no new page"
    saved = re.findall(r"^\| \[([\w.]+)\]\((\S+)\) \| (.*) \| (\d+) \|$", page(NBS / "architecture.ipynb"), flags=re.M)
    modules = {
        f"{p.parent.name}.{p.stem}": p.read_text(encoding="utf-8")
        for p in (ROOT / "internlm_nb").glob("*/*.py")
        if p.stem != "__init__"
    }
    docs = {name: re.match(r'"""(.*?)\.?"""', text, flags=re.S) for name, text in modules.items()}
    assert {name: doc for name, _, doc, _ in saved} == {name: doc[1] for name, doc in docs.items() if doc}
    for name, _, _, lines in saved:
        about = code_lines(modules[name])
        assert 0.8 * about - 10 <= int(lines) <= 1.2 * about + 10, f"{name}: run nbs/architecture.ipynb again"


# README and its translation


def test_readmes_agree():
    "README.md is what nbs/index.ipynb says, and README.zh.md has its headings, commands, code and links"
    said = subprocess.run(
        [sys.executable, "scripts/dev/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stdout + said.stderr


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    "what",
    [
        lambda t: changed(t, "train.py demo", "train.py dem0"),
        lambda t: t + "\n## One more\n",
        lambda t: t + "\n```\nls\n```\n",
        lambda t: t + "\n[more](LICENSE)\n",
        lambda t: t + "\n    an output\n",
        lambda t: t + "\nOne more sentence.\n",
    ],
    ids=["a command", "a heading", "a block", "a link", "an output", "a sentence"],
)
def test_a_translation_that_is_behind_is_seen(what):
    "Each kind of change of the README asks for one of its translation"
    sys.path.insert(0, str(ROOT / "scripts/dev"))
    try:
        from readme import behind
    finally:
        sys.path.pop(0)
    readme, translation = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    assert not behind(readme, translation)
    assert behind(what(readme), translation)


# what no file may say

# written in pieces, so that this file does not say them itself
FORBIDDEN = ["/" + "work/", "/" + "root/", "." + "library", "../" + "shared", "/tmp/" + "venv"]
MENTIONS = re.compile("|".join(map(re.escape, FORBIDDEN)))


def tracked() -> list[Path]:
    try:
        names = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / n for n in names if n and (ROOT / n).is_file()]


def test_no_file_speaks_of_a_machine():
    found = []
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" in raw[:4096] or path.suffix in (".xz", ".safetensors"):
            continue
        if path.suffix == ".ipynb":  # pictures are long texts in which any word may turn up
            data = json.loads(raw)
            for cell in data["cells"]:
                for output in cell.get("outputs", []):
                    output.get("data", {}).pop("image/png", None)
            raw = json.dumps(data, ensure_ascii=False).encode()
        for hit in MENTIONS.findall(raw.decode("utf-8", errors="replace")):
            found.append(f"{path.relative_to(ROOT)}: {hit}")
    assert not found

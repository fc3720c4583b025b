"settings.ini, the package and the notebooks agree; the floors of the house hold"

import ast
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT / "settings.ini")
FLOORS = [
    "base",
    "model",
    "data",
    "parallel",
    "zero",
    "checkpoint",
    "hub",
    "observe",
    "train",
    "run",
    "perf",
    "bench",
    "apps",
]
MODULES = sorted(
    p
    for p in (ROOT / "internlm_nb").rglob("*.py")
    if p.name not in ("__init__.py", "_modidx.py") and p.parent.name != "runs"
)
RUNS = sorted(p for p in (ROOT / "internlm_nb/apps/runs").glob("*.py") if p.name != "__init__.py")


def imports(path: Path) -> set[str]:
    "Every module that a file imports, lazily or not"
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts  # nbdev writes imports of the own package relative
            base = [*package[: len(package) + 1 - node.level], node.module] if node.level else [node.module]
            out |= {".".join([*filter(None, base), a.name]) for a in node.names}
    return out


def test_imports_are_seen():
    "The check below would be empty if relative imports were not resolved"
    assert any(n.startswith("internlm_nb.model.") for p in MODULES if p.parent.name == "train" for n in imports(p))


def test_version():
    init = (ROOT / "internlm_nb/__init__.py").read_text()
    version = re.search(r'__version__ = "(.*)"', init)
    assert version and version[1] == CFG["DEFAULT"]["version"]


def test_every_module_has_its_notebook():
    for p in MODULES:
        m = re.search(r"File to edit: (.*\.ipynb)\.", p.read_text())
        assert m, f"{p} was not made from a notebook"
        assert (p.parent / m[1]).exists(), f"{p}: its notebook {m[1]} is gone"


def test_shipped_runs_are_plain_files():
    "They are no modules of the house, and say in three lines what they are, whose recipe that is, and on how many ranks; nbdev would take longer texts for the package's own"
    assert len(RUNS) >= 8
    for p in RUNS:
        lines = (ast.get_docstring(ast.parse(p.read_text())) or "").splitlines()
        assert len(lines) == 3 and lines[1].startswith("Recipe: ") and lines[2].startswith("Worlds: "), p
        assert {n.split(".")[0] for n in imports(p)} == {"internlm_nb"}, p


def test_floors():
    "A folder imports only what stands above it in DESIGN's list"
    for p in MODULES:
        folder = p.parent.name
        allowed = FLOORS[: FLOORS.index(folder) + 1]
        for name in imports(p):
            if name.startswith("internlm_nb.") and name != "internlm_nb.__version__":
                assert name.split(".")[1] in allowed, f"{p} imports {name}, which stands below it"


def test_the_model_knows_no_parallelism():
    for p in MODULES:
        if p.parent.name == "model":
            assert not any(n.startswith("torch.distributed") for n in imports(p)), p


def test_no_unpickling():
    "Pickled files are never read. Ranks that one call started send each other functions by cloudpickle, over their own pipes: in one module, and from bytes alone"
    for p in MODULES:
        text = p.read_text()
        if p.relative_to(ROOT).as_posix() == "internlm_nb/parallel/ranks.py":
            text = re.sub(r"\bcloudpickle\.loads\(", "", text)
        assert not re.search(r"pickle\.(loads?|Unpickler)\b|allow_pickle=True", text), p
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, f"{p}: {call}"

"Every notebook in the kernel that its readers use, and every lesson cell against the exported module; nbdev-test runs them all in a shell of its own"

import os
from pathlib import Path

import nbformat
import pytest
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbclient import NotebookClient
from nbdev.config import get_config
from nbdev.process import NBProcessor

CFG = get_config(Path(__file__).parent.parent)
NBS = sorted(
    p
    for p in CFG.nbs_path.rglob("*.ipynb")
    if not p.name.startswith(("_", ".")) and ".ipynb_checkpoints" not in p.parts
)
SKIP = {"export", "exports", "exporti", *CFG.tst_flags.split()}


@pytest.mark.slow  # nbdev-test runs the same cells; what they would lack in the module, pyright misses too
@pytest.mark.parametrize("path", NBS, ids=lambda p: p.relative_to(CFG.nbs_path).as_posix())
def test_lessons_against_module(path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    nb = NBProcessor(path, rm_directives=False, process=True).nb
    mods = [c.directives_["default_exp"] for c in nb.cells if "default_exp" in c.directives_]
    sh = CaptureShell(path)
    sh.run_cell("import matplotlib; matplotlib.use('agg')")
    if mods:  # the lesson sees what the module has, imports included
        sh.run_cell(
            f"import importlib as _i; globals().update({{k: v for k, v in vars(_i.import_module('{CFG.lib_path.name}.{mods[0]}')).items() if not k.startswith('__')}})"
        )
        if sh.exc:
            raise sh.exc

    def skip(c):
        return c.cell_type != "code" or SKIP & set(c.directives_) or c.directives_.get("eval") == "false"

    with working_directory(path.parent):
        sh.run_all(nb, exc_stop=True, preproc=skip)
    if sh.exc:
        raise sh.exc
    assert os.environ.get("IN_TEST") == "1"


# what is not the same in a kernel: display, bars, signals, processes, the main thread
TOUCHY = {"observe/05_monitor", "parallel/10_ranks", "run/08_stopping", "apps/03_pretrain"}


def name_of(path: Path) -> str:
    return path.relative_to(CFG.nbs_path).with_suffix("").as_posix()


def left_out(cell) -> bool:
    "Cells that nbdev-test leaves out too: for a GPU, for hours, for show"
    directives = {
        word
        for line in cell.source.splitlines()
        if line.startswith("#|")
        for word in line[2:].replace(":", " ").split()[:1]
    }
    return cell.cell_type == "code" and bool(directives & set(CFG.tst_flags.split()) or "#| eval: false" in cell.source)


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=() if name_of(p) in TOUCHY else pytest.mark.slow, id=name_of(p)) for p in NBS]
)
def test_in_a_kernel(path, monkeypatch):
    "From top to bottom in Jupyter's own kernel, as a reader does who runs all cells"
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own
    monkeypatch.setenv("PYTHONPATH", f"{CFG.config_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("IN_TEST", "1")
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if not left_out(c)]
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()


def test_the_kernel_is_asked_of_notebooks_that_exist():
    assert {name_of(p) for p in NBS} >= TOUCHY

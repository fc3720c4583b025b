"Run every lesson cell against the exported module, so a missing `#| export` or import is caught and coverage counts"

import os
from pathlib import Path

import pytest
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.process import NBProcessor

CFG = get_config(Path(__file__).parent.parent)
NBS = sorted(p for p in CFG.nbs_path.rglob("*.ipynb") if not p.name.startswith(("_", ".")) and ".ipynb_checkpoints" not in p.parts)
SKIP = {"export", "exports", "exporti", *CFG.tst_flags.split()}


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

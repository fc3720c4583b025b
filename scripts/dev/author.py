"""Write notebooks as text.  author.py open NB ...: notebook -> .nbtext/NB.md    author.py build NB ...: .nbtext/NB.md -> notebook, export, run, save, clean

NB is a path under nbs/ without its ending, e.g. model/01_config. Cell ids and outputs are kept, so an unchanged text gives an unchanged notebook.
"""

import subprocess
import sys

from clean_nbs import clean
from nbdev.config import get_config
from nbdev.export import nb_export

from internlm_nb.base.docments import document

HEADER = "---\njupyter:\n  kernelspec:\n    display_name: python3\n    language: python\n    name: python3\n---\n\n"


def run(*cmd):
    "Run a command; stop on failure"
    if subprocess.call([str(c) for c in cmd]):
        sys.exit(f"failed: {' '.join(map(str, cmd))}")


def main():
    cfg = get_config()
    if len(sys.argv) < 3 or sys.argv[1] not in ("open", "build"):
        sys.exit(__doc__)
    for name in sys.argv[2:]:
        name = name.removeprefix("nbs/").removesuffix(".ipynb")
        nb, md = cfg.nbs_path / f"{name}.ipynb", cfg.config_path / ".nbtext" / f"{name}.md"
        md.parent.mkdir(parents=True, exist_ok=True)
        if sys.argv[1] == "open":
            run("jupytext", "--quiet", "--to", "md", nb, "-o", md)
            continue
        text = md.read_text()
        if not text.startswith("---"):
            md.write_text(HEADER + text)
        run("jupytext", "--quiet", *(["--update"] if nb.exists() else []), "--to", "ipynb", md, "-o", nb)
        nb_export(nb, lib_path=cfg.lib_path, procs=[document])
        run("nbdev-test", nb, "--save", "--do-print")
        clean(nb)


if __name__ == "__main__":
    main()

"nbdev-clean, plus dropping what changes on every run: widget model ids and terminal control codes. Usage: clean_nbs.py [NOTEBOOK ...]"

import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb, write_nb
from nbdev.clean import nbdev_clean
from nbdev.config import get_config

WIDGET = "application/vnd.jupyter.widget-view+json"
CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\r")


def tidy(nb) -> bool:
    "Drop volatile outputs in place; True when something changed"
    before = str(nb)
    nb.metadata.pop("widgets", None)
    for c in nb.cells:
        if "outputs" in c:
            c.outputs = [
                o
                for o in c.outputs
                if WIDGET not in o.get("data", {})
                and not (o.output_type == "stream" and not CONTROL.sub("", "".join(o.text)).strip())
            ]
    return str(nb) != before


def clean(path: Path):
    "Clean one notebook"
    nbdev_clean.__wrapped__(fname=str(path))
    nb = read_nb(path)
    if tidy(nb):
        write_nb(nb, path)


def main():
    given = [Path(a) for a in sys.argv[1:]]
    for p in given or sorted(get_config().nbs_path.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in p.parts:
            clean(p)


if __name__ == "__main__":
    main()

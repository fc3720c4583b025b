"This library beside its peers on this machine: `python scripts/bench.py --help`. All of it is internlm_nb.bench.cli"

import sys

from internlm_nb.apps.start import bench

if __name__ == "__main__":
    sys.exit(bench())

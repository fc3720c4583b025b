"This library beside its peers on this machine: `python scripts/bench.py --help`. All of it is internlm_nb.bench.cli"

import sys

from internlm_nb.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())

"This library beside its peers on this machine: `python scripts/bench.py --help`. All of it is internlm_nb.apps.bench"

import sys

from internlm_nb.apps.bench import main

if __name__ == "__main__":
    sys.exit(main())

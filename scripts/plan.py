"Look at a run before it is launched, on a laptop: `python scripts/plan.py --help`"

import sys

from internlm_nb.apps.start import plan

if __name__ == "__main__":
    sys.exit(plan())

"Weights to and from Hugging Face folders and checkpoints of the older system: `python scripts/convert.py --help`"

import sys

from internlm_nb.apps.start import convert

if __name__ == "__main__":
    sys.exit(convert())

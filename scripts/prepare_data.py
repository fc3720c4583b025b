"Text to token files and back: `python scripts/prepare_data.py --help`"

import sys

from internlm_nb.apps.start import data

if __name__ == "__main__":
    sys.exit(data())

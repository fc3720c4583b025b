"Train a run: python scripts/train.py demo. All of it is internlm_nb.apps.pretrain, and after pip install the same is internlm-train"

import sys

from internlm_nb.apps.start import train

if __name__ == "__main__":
    sys.exit(train())

"Talk to a model: `python scripts/chat.py MODEL_FOLDER`, or `--help`"

import sys

from internlm_nb.apps.start import chat

if __name__ == "__main__":
    sys.exit(chat())

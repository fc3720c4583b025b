"Train a run: python scripts/train.py demo. All of it is internlm_nb.apps.pretrain; this file knows where the shipped runs are"

from pathlib import Path

from internlm_nb.apps.pretrain import main

if __name__ == "__main__":
    main(runs=Path(__file__).parent / "configs")

#!/usr/bin/env bash
# What optional packages are for, tried with the packages themselves: installs them into a fresh environment,
# .venv-extras, and runs the slow tests that need them. Where pip's own index has no CPU build of PyTorch:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/dev/extras.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=agg PIP_CONSTRAINT="$PWD/.ci/constraints.txt"

rm -rf .venv-extras && python3 -m venv .venv-extras && . .venv-extras/bin/activate
pip install -q -e '.[dev,tracking]'
pip list | grep -iE '^(trackio|wandb|torch|tensorboard) '
pytest -m slow tests/test_trackers_real.py "$@"

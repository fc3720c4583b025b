"One thread a test process: two workers share two cores, and forked ranks must not inherit an OpenMP pool"
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import torch

torch.set_num_threads(1)

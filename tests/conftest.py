"One thread a test process: two workers share two cores, and forked ranks must not inherit an OpenMP pool"

import os
import signal
import threading

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
import torch._dynamo  # PyTorch's optimizers load it when they are made: once here, instead of in each rank of each test
from tqdm import tqdm

torch.set_num_threads(1)

# A script starts what it puts in the background with SIGINT ignored, and nohup ignores SIGHUP: children would inherit that, and could not be interrupted.
if threading.current_thread() is threading.main_thread():
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)

# tqdm shares its lock with forked children. A child that a test kills while it holds the lock would lock its parent for ever: give each process a lock of its own, and no monitor thread that could hold it during a fork.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


@pytest.fixture
def no_plots(monkeypatch):
    "Training tests are about numbers: drawing at the end of each of their runs would take most of their time"
    monkeypatch.setattr("internlm_nb.run.callbacks.save_plots", lambda run_dir: [run_dir / "plots" / "none"])

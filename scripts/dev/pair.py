"""Is this checkout as fast as another one?  pair.py OLD [NEW]   two checkouts, the same training steps, in alternating turns

Each checkout's contender is a process of its own, with its own library; ranks of a case are started anew for each turn. Prints how many times as fast NEW is (OLD's
seconds over NEW's, median step against median step within a round), the geometric mean over the cases, and peak memory; --out keeps the seconds in a JSON file.
"""

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

CASES = {  # shape, precision, ranks, (param, grad, optim)
    "23m bf16": ("23m-16k", "bfloat16", 1, (1, 1, 1)),
    "42m bf16": ("42m-16k", "bfloat16", 1, (1, 1, 1)),
    "20m-103k bf16": ("20m-103k", "bfloat16", 1, (1, 1, 1)),
    "23m fp32": ("23m-16k", "float32", 1, (1, 1, 1)),
    "23m bf16, 2 ranks, data": ("23m-16k", "bfloat16", 2, (1, 1, 1)),
    "23m bf16, 2 ranks, zero1": ("23m-16k", "bfloat16", 2, (1, 1, 2)),
    "23m bf16, 2 ranks, zero3": ("23m-16k", "bfloat16", 2, (2, 2, 2)),
}

WORKER = r"""
import json, os, resource, sys, time
from dataclasses import replace
import torch

sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]  # an installed checkout must not lend what this one lacks

def load(name):
    import importlib
    for room in ("apps", "train", "parallel", "bench", "run"):  # older rooms first
        try:
            return importlib.import_module(f"internlm_nb.{room}.{name}")
        except ModuleNotFoundError:
            pass
    raise SystemExit(f"no module {name}")

def contender(mesh, case, factors):
    from internlm_nb.train import parallelize
    from internlm_nb.train.config import RunConfig, TrainConfig, ZeroConfig
    from internlm_nb.train.optim import OptimConfig
    run = RunConfig("pair", case.config, optim=OptimConfig(lr=1e-4, clip=1.0), train=TrainConfig(precision=case.precision, seed=1, device="cpu"), zero=ZeroConfig(*factors))
    if hasattr(parallelize, "build"):
        built = parallelize.build(run, mesh)
        return built.model, built.optimizer
    model, placements = parallelize.build_model(run, mesh)
    return model, parallelize.build_optimizer(run, model, placements, mesh)

def steps(mesh, case, factors, threads, warm, n, state={}):
    from internlm_nb.train.step import train_step
    Batch = getattr(__import__("internlm_nb.train.step", fromlist=["Batch"]), "Batch", None)
    if Batch is None:
        Batch = __import__("internlm_nb.parallel.batch", fromlist=["Batch"]).Batch
    torch.set_num_threads(threads)
    if not state:
        load("host").keep_freed_memory()
        model, optimizer = contender(mesh, case, factors)
        batch = Batch.of(load("peers").make_pack(replace(case, seed=1 + mesh.rank)), mesh.device)
        state.update(model=model, optimizer=optimizer, batch=batch)
    out = []
    for i in range(warm + n):
        begin = time.perf_counter()
        batch = state["batch"]
        loss = train_step(state["model"], state["optimizer"], [batch, batch], 2 * batch.num_targets, mesh=mesh).loss.item()
        out.append(time.perf_counter() - begin)
    return out[warm:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, loss

def main():
    shape, precision, ranks, factors, tokens, threads = json.loads(sys.argv[1])
    peers = load("peers")
    case = peers.Case(peers.shapes()[shape], precision, check=False, lengths=(tokens,))
    if ranks == 1:
        from internlm_nb.parallel.mesh import single
        mesh = single()
        go = lambda warm, n: [steps(mesh, case, factors, threads, warm, n)]
    else:
        from internlm_nb.parallel.layout import Layout
        from internlm_nb.parallel.ranks import run_ranks
        go = lambda warm, n: run_ranks(lambda mesh: steps(mesh, case, factors, max(1, threads // ranks), 2, n, {}), Layout(ranks), timeout=600, show=False)
    go(2, 1)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(go(0, int(line))), flush=True)

if __name__ == "__main__":
    main()
"""


class Worker:
    "A checkout's contender"

    def __init__(self, checkout: Path, case: tuple, tokens: int, threads: int):
        env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        code = [sys.executable, "-c", WORKER, json.dumps([*case, tokens, threads])]
        self.process = subprocess.Popen(
            code, cwd=checkout, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self):
        "What it says next"
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a contender ended with code {self.process.wait()}")
        return json.loads(line)

    def turn(self, n: int) -> tuple[list[float], int, float]:
        "Seconds of n steps, of the slowest rank; peak memory of the largest; the loss"
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        ranks = self.answer()
        return [max(each) for each in zip(*(r[0] for r in ranks))], max(r[1] for r in ranks), ranks[0][2]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("old", type=Path)
    parse.add_argument("new", type=Path, nargs="?", default=Path(__file__).resolve().parents[2])
    parse.add_argument("--rounds", type=int, default=5)
    parse.add_argument("--steps", type=int, default=3)
    parse.add_argument("--tokens", type=int, default=512, help="of a micro-batch; a step has two of them")
    parse.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parse.add_argument("--only", default="", help="cases whose name has this in it")
    parse.add_argument("--out", type=Path)
    args = parse.parse_args()
    found = {}
    for name, case in CASES.items():
        if args.only not in name:
            continue
        sides = [Worker(path.resolve(), case, args.tokens, args.threads) for path in (args.old, args.new)]
        for side in sides:
            side.answer()
        turns = [
            [side.turn(args.steps) for side in sides[:: 1 if i % 2 == 0 else -1]][:: 1 if i % 2 == 0 else -1]
            for i in range(args.rounds)
        ]
        for side in sides:
            side.close()
        ratios = [statistics.median(old[0]) / statistics.median(new[0]) for old, new in turns]
        memory = [max(t[k][1] for t in turns) for k in (0, 1)]
        best = min(s for old, _ in turns for s in old[0]) / min(s for _, new in turns for s in new[0])
        found[name] = {
            "ratios": ratios,
            "best": best,
            "seconds": [[t[k][0] for t in turns] for k in (0, 1)],
            "peak_bytes": memory,
            "losses": [turns[-1][k][2] for k in (0, 1)],
        }
        print(
            f"{name:28} {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}; best against best {best:.3f})"
            f"   memory {memory[0] / 2**20:.0f} -> {memory[1] / 2**20:.0f} MiB",
            flush=True,
        )
    mean = math.exp(statistics.mean(math.log(statistics.median(f["ratios"])) for f in found.values()))
    print(f"geometric mean of the medians: {mean:.3f}")
    if args.out:
        commits = [
            subprocess.run(
                ["git", "-C", p, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip()
            for p in (args.old, args.new)
        ]
        about = {
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "commits": commits,
            "command": sys.argv[1:],
            "geometric_mean": mean,
        }
        args.out.write_text(json.dumps({**about, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

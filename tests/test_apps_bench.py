"scripts/bench.py: everything runs on tiny shapes, ratios are arithmetic, results are kept and shown. No test looks at a time"

import importlib.util
import json
import statistics
from pathlib import Path

import pytest

from internlm_nb.bench.cli import BenchConfig, main
from internlm_nb.bench.contest import ContestError, Worker, alternate, ratio, same_work
from internlm_nb.bench.generate import Task, first_difference
from internlm_nb.bench.gpu import gpu_cases, gpu_result
from internlm_nb.bench.peers import Case, installed, make_pack, mixed_lengths, shapes
from internlm_nb.bench.records import grid, keep, load, new_record, result_text, table
from internlm_nb.bench.train import contest_result, step_cost, train_field
from internlm_nb.model.config import num_params

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def test_a_ratio_is_formed_within_its_round():
    "A machine that is k times as slow in one round changes nothing, whichever round it is"
    ours, theirs = (
        [[1.0, 1.2, 1.1], [1.0, 1.0, 5.0], [2.0, 2.2, 2.4]],
        [[2.2, 2.0, 2.4], [1.5, 1.4, 1.6], [4.4, 4.0, 4.8]],
    )
    plain = ratio(ours, theirs)
    each = [statistics.median(b) / statistics.median(a) for a, b in zip(ours, theirs)]
    assert (plain.median, plain.low, plain.high, plain.rounds) == (statistics.median(each), min(each), max(each), 3)
    assert plain.best == 1.4 / 1.0
    for slow in range(3):
        scaled = [[[s * (4 if i == slow else 1) for s in r] for i, r in enumerate(side)] for side in (ours, theirs)]
        other = ratio(*scaled)
        assert (other.median, other.low, other.high) == (plain.median, plain.low, plain.high)  # times 4 is exact
    back = ratio(theirs, ours)
    assert abs(back.low * plain.high - 1) < 1e-12 and abs(back.high * plain.low - 1) < 1e-12
    for a, b in ((ours, theirs[:2]), ([], [])):
        with pytest.raises(ValueError, match="rounds"):
            ratio(a, b)


def test_turns_are_in_order_and_times_in_place():
    class Counter:
        count = 0

        def call(self, what, n):
            assert what == "run"
            Counter.count += 1
            return [float(Counter.count)] * n

    times, seen = alternate({"a": Counter(), "b": Counter()}, 3, 2, between=lambda: Counter.count)
    assert times == {"a": [[1.0] * 2, [3.0] * 2, [5.0] * 2], "b": [[2.0] * 2, [4.0] * 2, [6.0] * 2]}
    assert seen == [2, 4, 6]


def test_unequal_work_is_named():
    told = {
        "ours": {"parameters": 10, "loss32": 5.0},
        "a": {"parameters": 10, "loss32": 5.0 * (1 + 0.9e-5)},
        "b": {"parameters": 11, "loss32": float("nan")},
    }
    found = same_work(told, {"parameters": 0, "loss32": 1e-5})
    assert len(found) == 2 and all("b" in line for line in found)  # nan agrees with nothing


def test_a_worker_that_hangs_dies_or_cannot_begin_is_an_error():
    pause = "internlm_nb.bench.contest:Pause"
    with Worker("odd", pause, 60, timeout_s=30) as w:
        w.ready()
        w.timeout_s = 0.5
        with pytest.raises(ContestError, match=r"odd.*without an answer"):
            w.call("run", 1)
    for build, said in (
        (pause, "TypeError"),
        ("internlm_nb.bench.contest:Nobody", "Nobody"),
        ("no_such_module:x", "no_such_module"),
    ):
        with Worker("odd", build) as w, pytest.raises(ContestError, match=said):
            w.call("run", 1)


def test_shapes_are_of_the_sizes_they_are_called_by():
    for name, shape in shapes().items():
        head = name.split("-")[0]
        if head.endswith("m"):
            assert round(num_params(shape.config()) / 1e6) == int(head[:-1])
    assert 0.9e9 < num_params(shapes()["1b"].config()) < 1.6e9


@pytest.mark.parametrize("total", [1, 16, 2048, 8192])
def test_mixed_documents_fill_the_row(total):
    lengths = mixed_lengths(total)
    assert sum(lengths) == total and max(lengths) <= 384 and lengths == mixed_lengths(total)
    if total == 8192:
        assert 65 <= len(lengths) <= 80
    p = make_pack(Case(shapes()["tiny"], lengths=lengths))
    assert p.lengths == lengths and p.num_targets == total - len(lengths)


def test_cost_of_documents():
    "Cut into documents, a row costs less attention and the same products with weights"
    case = Case(shapes()["42m-16k"], lengths=(512,) * 4)
    assert step_cost(case) == step_cost(Case(shapes()["42m-16k"]))
    model, causal = step_cost(case)
    pairs, heads = 4 * 512 * 512, 8 * 64
    assert model - causal == pytest.approx(3 * 8 * 4 * (pairs - 4 * 512 * 513 / 2) * heads, rel=1e-9)


def test_a_kept_record_is_never_written_over_and_shows_itself(tmp_path):
    record = new_record(
        "train",
        {"device": "Ünusual/CPU @ 3 GHz", "threads": 2},
        [{"title": "t", "rows": [["a", "b"], ["x", "1"]]}],
        "bench.py train",
    )
    paths = {keep(record, tmp_path / "new") for _ in range(3)}
    assert len(paths) == 3 and all(load(p) == json.loads(json.dumps(record)) for p in paths)
    assert all(p.parent == tmp_path / "new" and "/" not in p.name for p in paths)
    assert "x  1" in table(load(paths.pop()))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        load(tmp_path / "bad.json")
    assert grid([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"


def test_gpu_table_by_hand():
    cases, missing = gpu_cases(shapes()["1b"], "cpu")
    fake = {"seconds": [[2.0, 2.0, 9.0]], "product_tflops": [600.0, 700.0], "tokens": 32768, "peak_bytes": 2**35}
    result = gpu_result(shapes()["1b"], cases, [fake, {"error": "out of memory"}], "NVIDIA H100 80GB HBM3", missing)
    model, causal = step_cost(cases[0])
    assert (
        result["summary"][0]["mfu"] == model / 2.0 / 1e12 / 989
        and result["summary"][0]["mfu_causal"] == causal / 2.0 / 1e12 / 989
    )
    assert result["summary"][0]["product_tflops"] == 700 and "out of memory" in " ".join(result["remarks"])
    assert gpu_result(shapes()["1b"], cases[:1], [fake], "unknown")["summary"][0]["mfu"] is None


def test_usage_errors_say_what_to_write(capsys, tmp_path):
    for words, said in (
        (["--show", str(tmp_path / "none.json")], "none.json"),
        (["train", "--peers", "torchtitan"], "choose from"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    for bad, said in (
        ({"shape": "7b"}, "42m-16k"),
        ({"dtype": "fp8"}, "float32"),
        ({"rounds": 0}, "--rounds"),
        ({"tokens": "many"}, "--tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            BenchConfig(**bad)
    with pytest.raises(ValueError, match=r"convert\.py"):
        Task(folder=str(tmp_path))


def test_without_peers_everything_still_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("internlm_nb.bench.peers.importlib.util.find_spec", lambda name: None)
    there, line = installed(("transformers", "litgpt"))
    assert there == [] and "pip install transformers litgpt" in line
    said: list[str] = []
    assert (
        main(
            ["train", "--smoke", "--shape", "tiny", "--dtype", "bfloat16", "--threads", "1", "--out", str(tmp_path)],
            said.append,
        )
        == 0
    )
    (path,) = tmp_path.glob("*.json")
    record = load(path)
    assert "pip install" in record["missing"] and list(record["results"][0]["seconds"]) == ["ours"]
    assert result_text(record["results"][0]) in "\n".join(said) and result_text(record["results"][0]) in table(record)


def beside_transformers(part: str, folder: Path) -> list[dict]:
    "Results of a part's smoke test"
    common = [
        "--smoke",
        "--peers",
        "transformers",
        "--dtype",
        "float32",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--out",
        str(folder),
    ]
    assert main([part, *common], lambda line: None) == 0
    return load(next(folder.glob(f"*_{part}.json")))["results"]


@pytest.mark.slow
@needs_transformers
def test_packed_training_beside_a_peer(tmp_path):
    "The same work on both sides, and a record that says so"
    for result in beside_transformers("packed", tmp_path):
        assert result["differences"] == [] and set(result["ratios"]) == {"transformers"}
        assert result["contenders"]["ours"]["loss32"] == pytest.approx(
            result["contenders"]["transformers"]["loss32"], rel=1e-5
        )


@pytest.mark.slow
@needs_transformers
def test_writing_beside_a_peer(tmp_path):
    "The same words from both"
    for result in beside_transformers("generate", tmp_path):
        assert result["first_difference"] == {"transformers": None}
        assert (
            first_difference(result["contenders"]["ours"]["answers"], result["contenders"]["transformers"]["answers"])
            is None
        )


def test_a_field_has_each_peer_in_each_style():
    case = Case(shapes()["tiny"], "bfloat16")
    field = train_field(case, ["transformers", "litgpt"], ["autocast", "pure"])
    assert [(kind, c.style) for kind, c in field.values()][1:] == [
        (p, s) for s in ("autocast", "pure") for p in ("transformers", "litgpt")
    ]
    assert next(iter(field.values())) == ("ours", case)
    found = {"contenders": {"ours": {"tokens": 10, "first_loss": 1.0, "peak_bytes": 2**20, "baseline_bytes": None}}, "seconds": {"ours": [[1.0, 2.0, 4.0]]}, "product_tflops": [1.0], "differences": ["x"], "ratios": {}}  # fmt: skip
    result = contest_result("t", case, found)
    assert result["summary"]["ours"]["tokens_per_s"] == 5 and result["summary"]["ours"]["best_tokens_per_s"] == 10
    assert result["remarks"][0].startswith("NOT THE SAME WORK")


def test_the_script_is_a_few_lines():
    text = (Path(__file__).parents[1] / "scripts" / "bench.py").read_text()
    assert len(text.splitlines()) < 12 and "internlm_nb.apps.start" in text

"Cells that a reader takes in at once: how long they are, how wide, and that a page's text holds no code that nobody runs"

import ast
import json
import re
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
MOST_LINES, MOST_MEDIAN, WIDTH = 60, 20, 120
PRAGMA = re.compile(r"#\s*(type: ignore|noqa|pyright:)")
CLASS, STORY = "one class, in one piece", "one function, told in the order in which things happen"
# Cells over 60 lines, by module and first name: lines and reason. A number may only go down, and no line may be added.
LONGER: dict[str, tuple[int, str]] = {
    "apps.chat: Chatter": (62, CLASS),
    "apps.chat: parser": (68, STORY),
    "bench.contest: Worker": (82, CLASS),
    "bench.gpu: gpu_result": (76, STORY),
    "bench.zero: sharded_contest": (67, STORY),
    "checkpoint.reader: Checkpoint": (104, CLASS),
    "checkpoint.writer: Writer": (75, CLASS),
    "data.json_tokenizer: JsonTokenizer": (77, CLASS),
    "data.json_tokenizer: JsonVocabulary": (72, CLASS),
    "data.loader: Loader": (84, CLASS),
    "data.order: ShuffledPacks": (101, CLASS),
    "data.tokenfile: TokenFile": (98, CLASS),
    "data.tokenfile: TokenWriter": (63, CLASS),
    "data.tokenfiles: TokenFolder": (67, CLASS),
    "data.tokenizer: Tokenizer": (94, CLASS),
    "hub.huggingface: HFCheckpoint": (61, CLASS),
    "hub.internevo: write_internevo": (65, STORY),
    "hub.source: Weights": (68, CLASS),
    "model.beam: beam_search": (67, STORY),
    "model.config: ModelConfig": (161, CLASS),
    "model.moe: MixtureOfExperts": (68, CLASS),
    "model.segments: Inputs": (61, CLASS),
    "model.segments: KVCache": (100, CLASS),
    "observe.guarded: Guarded": (71, CLASS),
    "observe.profile: StepProfiler": (72, CLASS),
    "parallel.expert: SplitMixture": (62, CLASS),
    "parallel.layout: Layout": (94, CLASS),
    "parallel.layout: check": (66, STORY),
    "parallel.mesh: Mesh": (76, CLASS),
    "parallel.messages: follow": (77, STORY),
    "parallel.pipeline: _PipelineRun": (98, CLASS),
    "parallel.placement: Placement": (83, CLASS),
    "parallel.ranks: run_ranks": (61, STORY),
    "parallel.record: Recorder": (67, CLASS),
    "parallel.vocab: SplitCrossEntropy": (75, CLASS),
    "run.folder: Guard": (78, CLASS),
    "run.recorder: Recorder": (61, CLASS),
    "run.saver: Saver": (74, CLASS),
    "run.stepper: Stepper": (64, CLASS),
    "run.trainer: Loop": (77, CLASS),
    "run.trainer: Trainer": (154, CLASS),
    "train.optim: Optimizer": (71, CLASS),
    "zero.hybrid: HybridZero": (113, CLASS),
    "zero.offload: HostAdamW": (63, CLASS),
    "zero.reduce: Accumulator": (94, CLASS),
    "zero.reduce: Rounds": (61, CLASS),
    "zero.sharding: Sharding": (85, CLASS),
    "zero.units: Gathers": (98, CLASS),
}


def code_cells() -> list[tuple[Path, str, bool]]:
    "(notebook, source, is it exported?) of every code cell"
    out = []
    for path in sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                source = "".join(cell["source"])
                out.append((path, source, bool(re.match(r"#\|\s*export", source))))
    return out


def lines_of(source: str) -> int:
    return sum(bool(line.strip()) and not line.startswith("#|") for line in source.split("\n"))


def name_of(path: Path, source: str) -> str:
    "module: first class or function"
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = next((n.name for n in ast.parse(source).body if isinstance(n, named)), "?")
    return f"{path.parent.name}.{path.stem[3:]}: {first}"


def test_exported_cells_are_short():
    exported = [(path, source) for path, source, is_exported in code_cells() if is_exported]
    assert median(lines_of(source) for _, source in exported) < MOST_MEDIAN
    long = {name_of(path, source): n for path, source in exported if (n := lines_of(source)) > MOST_LINES}
    grown = {name: n for name, n in long.items() if n > LONGER.get(name, (MOST_LINES, ""))[0]}
    assert not grown, f"cells of more than {MOST_LINES} lines: part them, or take work out of them: {grown}"
    shrunk = {name: long.get(name, MOST_LINES) for name, (n, _) in LONGER.items() if long.get(name, 0) < n}
    assert not shrunk, f"shorter than LONGER says; write the new number, or take the line out: {shrunk}"


def test_lines_of_code_are_narrow():
    wide = [
        f"{path.relative_to(NBS)}: {line.strip()[:80]}"
        for path, source, _ in code_cells()
        for line in source.split("\n")
        if len(line) > WIDTH and not PRAGMA.search(line)
    ]
    assert not wide, wide


def test_one_statement_a_line():
    crowded = []
    for path, source, is_exported in code_cells():
        if is_exported:
            for node in ast.walk(ast.parse(source)):
                body = (
                    [n.lineno for n in getattr(node, "body", []) if isinstance(n, ast.stmt)]
                    if isinstance(node, ast.stmt | ast.Module)
                    else []
                )
                crowded += [f"{path.relative_to(NBS)}: {n}" for n in body if body.count(n) > 1]
    assert not crowded, crowded


def test_no_code_in_prose():
    "Python in a Markdown cell is run by nobody, and so becomes wrong"
    fenced = [
        str(path.relative_to(NBS))
        for path in NBS.rglob("*.ipynb")
        if path.name != "index.ipynb"  # the README, whose blocks are tested
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "markdown" and re.search(r"^```\s*(python|py)\b", "".join(cell["source"]), re.M)
    ]
    assert not fenced, fenced

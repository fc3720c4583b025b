"The names that users import from the package itself, and what can be imported where neither PyTorch nor NumPy is installed"

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import internlm_nb

FACE = {
    *"ModelConfig preset presets Transformer Tokenizer train_tokenizer read_tokens write_tokens pack DataConfig OptimConfig".split(),
    *"ScheduleConfig TrainConfig CheckpointConfig LogConfig ParallelConfig ZeroConfig RunConfig Trainer train_step generate".split(),
    *"Sampling beam_search from_hf to_hf read_metrics run_ranks Layout Sharding".split(),
}
CONFIGS = "ModelConfig DataConfig OptimConfig ScheduleConfig TrainConfig CheckpointConfig LogConfig ParallelConfig ZeroConfig RunConfig Layout Sharding"


def in_python(code: str) -> str:
    "What a new process prints"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_names_of_everyday_work_come_from_the_package_itself():
    assert FACE <= set(internlm_nb.__all__) <= set(dir(internlm_nb))
    for name in internlm_nb.__all__:
        value = getattr(internlm_nb, name)
        assert name == "__version__" or (value.__module__.startswith("internlm_nb.") and value.__doc__), name
    with pytest.raises(AttributeError, match="no attribute 'Trainr'; did you mean Trainer"):
        internlm_nb.Trainr  # noqa: B018


def test_editors_read_the_same_list():
    tree = ast.parse(Path(internlm_nb.__file__).read_text())
    typed = [x for node in tree.body if isinstance(node, ast.If) for x in node.body if isinstance(x, ast.ImportFrom)]
    assert {(a.asname, x.module) for x in typed for a in x.names} == set(internlm_nb._WHERE.items())
    assert all(a.name == a.asname for x in typed for a in x.names)


def test_the_face_loads_nothing_before_it_is_asked():
    heavy = "[m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'matplotlib', 'safetensors')]"
    code = f"import sys\nimport internlm_nb\ndir(internlm_nb)\nfrom internlm_nb import {CONFIGS.replace(' ', ', ')}\nprint({heavy})"
    assert in_python(code) == "[]\n"
    loaded = "[m for m in sys.modules if m.startswith('internlm_nb.')]"
    assert in_python(f"import sys\nimport internlm_nb\nprint({loaded})") == "[]\n"


PURE = """base.check base.steps base.values base.docments data.config model.config model.flops parallel.layout parallel.record parallel.tokens parallel.traffic parallel.schedules parallel.timeline
model.params train.schedules train.options train.config train.sizes train.traffic zero.sharding zero.flat zero.formulas zero.costs zero.amsp""".split()


def test_closed_forms_and_configurations_need_the_standard_library_alone():
    "With every package of other makers blocked, they import, and say what they know"
    code = f"""
import sys, sysconfig
class Blocked:
    def find_spec(self, name, path=None, target=None):
        root = name.partition('.')[0]
        if root not in sys.stdlib_module_names and root != 'internlm_nb':
            raise ModuleNotFoundError(f'{{name}} is blocked')
sys.meta_path.insert(0, Blocked())
import importlib
for name in {PURE!r}:
    importlib.import_module('internlm_nb.' + name)
from internlm_nb import RunConfig, preset, num_params, step_flops, Sharding, Layout
run = RunConfig('x', preset('internlm-7b'))
print(num_params(run.model))
"""
    assert in_python(code) == f"{internlm_nb.num_params(internlm_nb.preset('internlm-7b'))}\n"


@pytest.mark.parametrize("name", ["DataConfig", "Trainer", "run_ranks", "generate", "pack", "ZeroConfig"])
def test_help_says_what_each_parameter_is(name):
    "The comment beside each parameter stands in the exported docstring"
    value = getattr(internlm_nb, name)
    module = importlib.import_module(value.__module__)
    assert module.__file__
    doc = inspect.getdoc(value) or ""
    taken = list(inspect.signature(value).parameters)
    said = [
        line.strip().lstrip("*").partition(":")[0]
        for line in doc.partition("Args:")[2].splitlines()
        if line.startswith("    ")
    ]
    assert set(taken) <= set(said), (set(taken) - set(said), doc)

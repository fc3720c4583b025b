"""InternLM's training system as notebooks: nbs/ holds the text that makes this package.

The names of everyday work can be imported from here; each is loaded when it is first asked for. So `import internlm_nb`
costs nothing, and configurations and closed forms work where PyTorch is not installed.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what editors and type checkers read; a test holds it and the table below to one list
    from .model.config import ModelConfig as ModelConfig, num_params as num_params, preset as preset, presets as presets
    from .model.transformer import Transformer as Transformer
    from .model.init import init_weights as init_weights
    from .model.flops import step_flops as step_flops
    from .model.generate import generate as generate
    from .model.sampling import Sampling as Sampling
    from .model.beam import beam_search as beam_search
    from .data.tokenizer import Tokenizer as Tokenizer, train_tokenizer as train_tokenizer
    from .data.json_tokenizer import open_tokenizer as open_tokenizer
    from .data.tokenfile import write_tokens as write_tokens
    from .data.tokenfiles import read_tokens as read_tokens
    from .data.packing import pack as pack
    from .data.config import DataConfig as DataConfig
    from .checkpoint.reader import Checkpoint as Checkpoint
    from .parallel.layout import Layout as Layout
    from .parallel.record import Recorder as Recorder
    from .parallel.mesh import Mesh as Mesh, make_mesh as make_mesh
    from .parallel.ranks import run_ranks as run_ranks
    from .zero.sharding import Sharding as Sharding
    from .zero.hybrid import HybridZero as HybridZero
    from .hub.huggingface import from_hf as from_hf, to_hf as to_hf
    from .hub.load import load_model as load_model
    from .observe.sinks import read_metrics as read_metrics
    from .train.schedules import ScheduleConfig as ScheduleConfig
    from .train.options import LossScaleConfig as LossScaleConfig, OptimConfig as OptimConfig
    from .train.config import CheckpointConfig as CheckpointConfig, LogConfig as LogConfig, ParallelConfig as ParallelConfig, RunConfig as RunConfig, TrainConfig as TrainConfig, ZeroConfig as ZeroConfig
    from .train.optim import Optimizer as Optimizer
    from .train.step import train_step as train_step
    from .train.parallelize import build as build
    from .run.callbacks import Callback as Callback
    from .run.trainer import Trainer as Trainer

_ROOMS = {  # module -> names
    "model.config": "ModelConfig num_params preset presets",
    "model.transformer": "Transformer",
    "model.init": "init_weights",
    "model.flops": "step_flops",
    "model.generate": "generate",
    "model.sampling": "Sampling",
    "model.beam": "beam_search",
    "data.tokenizer": "Tokenizer train_tokenizer",
    "data.json_tokenizer": "open_tokenizer",
    "data.tokenfile": "write_tokens",
    "data.tokenfiles": "read_tokens",
    "data.packing": "pack",
    "data.config": "DataConfig",
    "checkpoint.reader": "Checkpoint",
    "parallel.layout": "Layout",
    "parallel.record": "Recorder",
    "parallel.mesh": "Mesh make_mesh",
    "parallel.ranks": "run_ranks",
    "zero.sharding": "Sharding",
    "zero.hybrid": "HybridZero",
    "hub.huggingface": "from_hf to_hf",
    "hub.load": "load_model",
    "observe.sinks": "read_metrics",
    "train.schedules": "ScheduleConfig",
    "train.options": "LossScaleConfig OptimConfig",
    "train.config": "CheckpointConfig LogConfig ParallelConfig RunConfig TrainConfig ZeroConfig",
    "train.optim": "Optimizer",
    "train.step": "train_step",
    "train.parallelize": "build",
    "run.callbacks": "Callback",
    "run.trainer": "Trainer",
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names.split()}
__all__ = ["__version__", *sorted(_WHERE)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    "A name of the face, loaded at its first use"
    if name not in _WHERE:
        from .base.check import nearest

        near = " or ".join(nearest(name, _WHERE))
        raise AttributeError(f"module 'internlm_nb' has no attribute {name!r}{f'; did you mean {near}?' if near else ''}")
    value = globals()[name] = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    "What tab completion shows"
    own = {name for name, value in globals().items() if name.startswith("__") or isinstance(value, ModuleType)}
    return sorted(own | _WHERE.keys())

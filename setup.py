"Package build: every value comes from settings.ini."

from configparser import ConfigParser
from pathlib import Path
from shlex import split

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
licenses = {"apache2": "Apache-2.0"}
statuses = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]
readme = root / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=licenses[cfg["license"]],
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
    ],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=["internlm_nb", "internlm_nb.*"]),
    package_data={"internlm_nb": ["corpus/**/*", "apps/runs/*.py"]},
    install_requires=split(cfg["requirements"]),
    extras_require={
        "dev": split(cfg["dev_requirements"]),
        "notebooks": split(cfg["notebooks_requirements"]),
        "gpu": split(cfg["gpu_requirements"]),
        "fp8": split(cfg["fp8_requirements"]),
        "hf": split(cfg["hf_requirements"]),
        "tensorboard": split(cfg["tensorboard_requirements"]),
        "data": split(cfg["data_requirements"]),
        "tracking": split(cfg["tracking_requirements"]),
        "bench": split(cfg["bench_requirements"]),
    },
    entry_points={"console_scripts": split(cfg["console_scripts"]), "nbdev": ["internlm_nb=internlm_nb._modidx:d"]},
)

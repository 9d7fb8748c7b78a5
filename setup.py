"""Packaging. `kernels/` and `tools/` are top-level directories that are installed inside the package.

`kernels` is also the name of a Hugging Face distribution, so the top-level names must never be installed: hence
`find_packages` for this package only, and the two mapped directories by name.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_prealign/__init__.py").read_text()).group(1)
PYGLOSSARY = ["pyglossary>=4.6,<5.3; python_version < '3.12'", "pyglossary>=4.6; python_version >= '3.12'"]

setup(
    name="megatron-prealign",
    version=VERSION,
    description="Alignment phase and input-only code-switching for multilingual pretraining on Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[
        *find_packages(include=["megatron_prealign", "megatron_prealign.*"]),
        "megatron_prealign.kernels",
        "megatron_prealign.tools",
    ],
    package_dir={"megatron_prealign.kernels": "kernels", "megatron_prealign.tools": "tools"},
    package_data={"megatron_prealign": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.17",
        # Megatron-Core's checkpointing imports psutil without declaring it.
        "psutil>=5.9",
        "triton>=3.2; platform_system == 'Linux'",
        "numpy",
        "jsonargparse>=4.52",
        "docstring-parser>=0.15",
        "pyyaml",
        "sentencepiece>=0.2",
        # sentencepiece_model_pb2, which reads sentencepiece models, needs it without declaring it.
        "protobuf>=3.20",
        "tokenizers>=0.20",
        "transformers>=4.46",
        "safetensors>=0.4",
        "orjson>=3.9",
        "pyarrow>=14",
        "zstandard>=0.21",
        "xxhash>=3.2",
        "tqdm>=4.66",
        "tensorboard>=2.14",
        "matplotlib>=3.8",
    ],
    extras_require={
        # Word segmenters for Chinese, Japanese, Thai and other scripts without spaces (preprocess --segmenter).
        "segmenters": [
            "jieba>=0.42.1",
            "sudachipy>=0.7",
            "sudachidict-small",
            "pythainlp>=5",
            "icu4py>=1.2",
        ],
        # A much faster engine for byte-level BPE; its ids are compared with those of the tokenizer's own library.
        "fast": ["gigatoken>=0.10"],
        # Inputs named hf:NAME.
        "hub": ["datasets>=2.19"],
        # logging.wandb in a recipe.
        "wandb": ["wandb>=0.20"],
        # Dictionary formats without a reader of our own; GPL. From 5.3 it uses syntax of Python 3.12, although its
        # metadata says 3.10.
        "dictionaries": PYGLOSSARY,
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "jsonschema>=4.18",
            # Drives the system's Chromium; its own browsers are not downloaded.
            "playwright>=1.49",
            # The segmenter of the tests; tests of the others are skipped if these are not installed.
            "jieba>=0.42.1",
            "gigatoken>=0.10",
            "datasets>=2.19",
            "wandb>=0.20",
            *PYGLOSSARY,
            "ruff==0.17.5",
            "mypy==2.4.1",
            "types-PyYAML",
            "types-tqdm",
            "types-psutil",
            "pre-commit>=3.5",
        ],
        # `make docs`. Sphinx and not MkDocs: Material for MkDocs ends in May 2027.
        "docs": ["sphinx>=8.1", "myst-parser>=4", "furo>=2024.8", "sphinx-copybutton>=0.5.2"],
    },
    entry_points={"console_scripts": ["megatron-prealign = megatron_prealign.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)

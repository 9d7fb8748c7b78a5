"""Preprocessing runs that end early: inputs, settings and output."""

import json
from pathlib import Path

import numpy

from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer

# Small blocks, and a save after every one or two of them.
SETTINGS = PreprocessSettings(
    language="zh",
    on_error="skip",
    limits=Limits(block_bytes=2500),
    save_every_bytes=3000,
    use_fast_engine=False,
    overwrite=True,
)


def text(generator: numpy.random.Generator) -> str:
    return " ".join(generator.choice(["我们", "苹果", "dog", "14", "öl"], generator.integers(1, 60)))


def make_inputs(path: Path) -> Path:
    """Writes the inputs and a tokenizer to the directory `path`; returns it."""
    generator = numpy.random.default_rng(0)
    lines = [json.dumps({"text": text(generator), "l": ["zh", "de"][n % 2]}) for n in range(40)]
    (path / "a.jsonl").write_text("\n".join([*lines[:20], "no JSON", *lines[20:]]) + "\n", encoding="utf-8")
    (path / "b.txt").write_text("\n\n".join(text(generator) for _ in range(40)), encoding="utf-8")
    train_tokenizer([path / "a.jsonl"], path / "tok", 270, on_error="skip", show_progress=False)
    return path


def inputs(directory: Path) -> list[Path]:
    return [directory / "a.jsonl", directory / "b.txt"]


def run(directory: Path, out: Path, settings: PreprocessSettings) -> None:
    preprocess(inputs(directory), directory / "tok", out, settings, show_progress=False)


def files(out: Path) -> dict[str, bytes]:
    """All output files of this prefix."""
    return {path.name[len(out.name) :]: path.read_bytes() for path in sorted(out.parent.glob(f"{out.name}*"))}

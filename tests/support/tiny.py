"""A tiny corpus, tokenizer and dictionary for tests: English sentences and their English-Clone."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prealign.dictionary.build import BuildSettings, build_table, read_groups
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.readers import parse_input
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer
from megatron_prealign.recipe import Recipe, load_recipe
from megatron_prealign.tokenizer.load import load_tokenizer
from support.english import english_texts

VOCAB_SIZE = 512


@dataclass(frozen=True)
class Tiny:
    """Paths of the tiny files."""

    directory: Path

    @property
    def tokenizer(self) -> str:
        return str(self.directory / "tokenizer")

    @property
    def table(self) -> str:
        return str(self.directory / "table.safetensors")

    def values(self, run_dir: Path) -> dict[str, Any]:
        """Returns a small recipe with both phases, as plain values that a test may change."""
        return {
            "model": {
                "num_layers": 4,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                # Pads the 1,024 ids, with more padding at TP2 than at TP1.
                "make_vocab_size_divisible_by": 24,
            },
            "data": {
                "tokenizer": self.tokenizer,
                "seq_length": 32,
                "cache": str(self.directory / "cache"),
                "sources": [
                    {"path": str(self.directory / "en"), "language": "en", "weight": 0.8},
                    {"path": str(self.directory / "en_clone"), "language": "en_clone", "weight": 0.2},
                ],
                "validation_fraction": 0.1,
            },
            "dictionary": {"table": self.table},
            "alignment": {
                "train_iters": 5,
                "words_per_step": 32,
                "lr": 1e-3,
                "lm_global_batch_size": 4,
                "lm_micro_batch_size": 2,
            },
            "code_switch": {"ratio": 0.3},
            "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
            "training": {
                "seed": 3,
                # Two microbatches in one process. The time of a run is that of its calls, not of its tokens.
                "micro_batch_size": 4,
                "global_batch_size": 8,
                "train_iters": 5,
                "precision": "fp32",
                "eval_samples": 6,
                "retrieval_words": 50,
            },
            "logging": {"run_dir": str(run_dir), "log_interval": 1, "tensorboard": False},
        }

    def sentences(self) -> dict[str, Any]:
        """Entry of data.parallel_text: single lines of the corpus in both languages, written by the first call."""
        prefixes = {language: str(self.directory / f"lines_{language}") for language in ("en", "en_clone")}
        if not (self.directory / "lines_en_clone.json").exists():
            corpus = (self.directory / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
            lines = [line for text in corpus for line in json.loads(text)["text"].splitlines() if " " in line.strip()]
            path = self.directory / "lines.jsonl"
            path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:60]), encoding="utf-8")
            for language, prefix in prefixes.items():
                preprocess([str(path)], self.tokenizer, prefix, PreprocessSettings(language=language), False)
        return {"source": prefixes["en"], "target": prefixes["en_clone"]}


def recipe_of(values: dict[str, Any], directory: Path) -> Recipe:
    """Parses plain values in the same way as a user's YAML."""
    directory.mkdir(parents=True, exist_ok=True)
    # One file per rank, since ranks write at the same time and one could read a file that another has truncated.
    path = directory / f"test_recipe_{os.getpid()}.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return load_recipe(["--config", str(path)])


def make_tiny(directory: Path) -> Tiny:
    """Writes the corpus, trains the tokenizer, preprocesses both languages and builds the table."""
    texts = english_texts(107)
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tiny = Tiny(directory)
    train_tokenizer([str(corpus)], tiny.tokenizer, VOCAB_SIZE, "en_clone", show_progress=False)
    for language in ("en", "en_clone"):
        preprocess(
            [str(corpus)], tiny.tokenizer, str(directory / language), PreprocessSettings(language=language), False
        )
    words = Counter(re.findall(r"[a-z]{3,}", " ".join(texts)))
    word_list = directory / "words.tsv"
    word_list.write_text("".join(f"{word}\t{word}\n" for word, _ in words.most_common(300)), encoding="utf-8")
    tokenizer = load_tokenizer(tiny.tokenizer)
    report = BuildReport()
    groups, _ = read_groups([parse_input(f"{word_list}:en-en_clone", None, "auto", "")], report)
    build_table(groups, tokenizer, BuildSettings(), report).save(tiny.table)
    return tiny

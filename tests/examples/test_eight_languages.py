"""From raw files to a training batch, with text in eight languages and five word lists, by the commands that a user
types."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from megatron_prealign.cli import main
from megatron_prealign.code_switch.switcher import CodeSwitcher
from megatron_prealign.data.indexed import open_indexed
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.dictionary.coverage import measure_coverage
from megatron_prealign.dictionary.switchable import switchable_table
from megatron_prealign.dictionary.table import load_table
from megatron_prealign.recipe import load_recipe
from megatron_prealign.run.inputs import open_plan, open_vocabulary
from megatron_prealign.run.pretrain import build_sequence_format
from megatron_prealign.tokenizer.load import load_tokenizer

FILES = Path(__file__).parents[1] / "data" / "languages"
LANGUAGES = ("ar", "de", "en", "es", "fr", "ja", "ru", "zh")
DICTIONARIES = ("ar", "de", "es", "ja", "ru")
SEQ_LENGTH = 64
RECIPE = """
model: {{num_layers: 1, hidden_size: 32, num_attention_heads: 4}}
data:
  tokenizer: {directory}/tokenizer
  seq_length: {seq_length}
  cache: {directory}/cache
  validation_fraction: 0.05
  sources:
{sources}
dictionary: {{table: {directory}/table.safetensors}}
code_switch: {{ratio: 0.5}}
optimizer: {{lr: 1.0e-3, lr_warmup_iters: 1}}
training: {{seed: 1, precision: fp32, micro_batch_size: 4, global_batch_size: 64, train_iters: 2}}
logging: {{run_dir: {directory}/run}}
"""


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("languages")
    corpora = [f"{FILES}/{language}.txt:{language}" for language in LANGUAGES]
    command("train-tokenizer", "--input", *corpora, "--output", path / "tokenizer", "--vocab-size", 800,
            "--temperature", 2)  # fmt: skip
    for language in LANGUAGES:
        needs = {"zh": "jieba", "ja": "sudachipy"}.get(language)
        segmenter = ["--segmenter", "auto"] if needs and importlib.util.find_spec(needs) else []
        command("preprocess", "--input", FILES / f"{language}.txt", "--tokenizer", path / "tokenizer",
                "--output", path / language, "--language", language, "--workers", 1, *segmenter)  # fmt: skip
    lists = [f"{FILES}/en-{language}.tsv:en-{language}" for language in DICTIONARIES]
    command("dictionary", "build", "--input", *lists, "--tokenizer", path / "tokenizer",
            "--output", path / "table.safetensors", "--corpus", path / "en")  # fmt: skip
    sources = [f"    - {{path: {path}/{language}, language: {language}, weight: 1.0}}" for language in LANGUAGES]
    (path / "recipe.yaml").write_text(RECIPE.format(directory=path, seq_length=SEQ_LENGTH, sources="\n".join(sources)))
    return path


def test_the_token_files_hold_the_text(directory: Path) -> None:
    tokenizer = load_tokenizer(directory / "tokenizer")
    for language in LANGUAGES:
        texts = (FILES / f"{language}.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
        dataset, sidecar = open_indexed(directory / language), load_sidecar(directory / language)
        assert (len(dataset), sidecar.documents, sidecar.language) == (len(texts), len(texts), language)
        assert sidecar.bytes == sum(len(text.encode()) for text in texts)
        # Byte-level: what comes back is the text itself.
        assert [tokenizer.decode(row[:-1]) for row in dataset] == texts
    command("dataset", "verify", "--input", *(directory / language for language in LANGUAGES))


def test_a_training_batch(directory: Path) -> None:
    command("pretrain", "--config", directory / "recipe.yaml", "--validate")
    command("dataset", "prepare-cache", "--config", directory / "recipe.yaml")
    recipe = load_recipe(["--config", str(directory / "recipe.yaml")])
    vocabulary = open_vocabulary(recipe)
    plan = open_plan(recipe, vocabulary)
    assert not plan.write_index()
    rows = plan.open().batch(range(64))
    assert set(rows.language.tolist()) == set(range(len(recipe.data.languages)))
    table = load_table(directory / "table.safetensors")
    table = switchable_table(table, recipe.code_switch, recipe.data.languages)
    switcher = CodeSwitcher(
        table, recipe.code_switch, build_sequence_format(recipe, vocabulary), seed=1,
        languages=recipe.data.languages, device=torch.device("cpu"), coverage=None,
    )  # fmt: skip
    batch = switcher(rows.tokens, rows.language, rows.sample_id, 0, rows.word_starts)
    assert batch.tokens.shape == batch.labels.shape == (64, SEQ_LENGTH)
    english = rows.language == recipe.data.languages.index("en")
    changed = (batch.tokens != rows.tokens[:, :SEQ_LENGTH]).any(dim=1)
    # The lists have English words alone on their left side.
    assert changed[english].float().mean() > 0.7 and not changed[~english].any()
    # What the model is asked for is text, never a translation; where a row was switched, part of it is not asked for.
    scored = batch.loss_mask.bool()
    assert scored[~english].float().mean() > 0.99 and 0.3 < scored[english].float().mean() < 0.99
    originals = [set(row.tolist()) for row in rows.tokens]
    for number in range(64):
        assert set(batch.labels[number][scored[number]].tolist()) <= originals[number]


def test_what_the_dictionaries_know(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    command("dictionary", "report", "--table", directory / "table.safetensors", "--corpus", directory / "en",
            "--output", directory / "report")  # fmt: skip
    table = load_table(directory / "table.safetensors")
    assert set(table.languages) == {"en", *DICTIONARIES}
    assert table.num_groups > 100
    report = json.loads((directory / "report/report.json").read_text(encoding="utf-8"))
    (corpus,) = report["corpora"]
    measured = measure_coverage(table, directory / "en")
    assert (corpus["running_words"], corpus["known_words"]) == (measured.running_words, measured.known_words)
    # The lists know the words of the text apart from articles, pronouns and verbs.
    assert 0.3 < corpus["coverage"] < 0.7
    assert len(corpus["unknown_words"]) == 50 and len(corpus["samples"]) == 20
    page = (directory / "report/report.html").read_text(encoding="utf-8")
    assert f"{corpus['coverage']:.1%}" in page
    # It fetches nothing.
    assert not re.search(r"(src|href)=.?https?:|<link|@import", page)

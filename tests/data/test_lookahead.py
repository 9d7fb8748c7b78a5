"""Lookahead tokens and word bitmap bits, compared with plain reconstructions from the documents."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.messages import user_error
from support.sidecars import save_sidecar
from support.token_datasets import (
    ENGLISH,
    GERMAN,
    LANGUAGES,
    LATIN,
    build,
    plain_epoch,
    section,
    source_seed,
    write_dataset,
)

from megatron_prealign.data.indexed import open_indexed
from megatron_prealign.data.samples import TrainPlan, ValidationSamples
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.data.word_bitmap import WordBitmap, words_path


@pytest.fixture
def directory(tmp_path) -> Path:
    write_dataset(tmp_path / "english", ENGLISH, "en")
    write_dataset(tmp_path / "german", GERMAN, "de")
    return tmp_path


def starts_word(tokens: np.ndarray) -> np.ndarray:
    """A bit derived from the token id, which is unique in these datasets: a misplaced bit is detected."""
    return (tokens * 2_654_435_761 >> 7) & 1 == 1


def add_bitmap(prefix: Path, documents: list[np.ndarray]) -> None:
    # Bit by bit, independent of the packing under test.
    packed = bytearray(-(-sum(map(len, documents)) // 8))
    for index, bit in enumerate(starts_word(np.concatenate(documents)).tolist()):
        packed[index // 8] |= bit << index % 8
    words_path(prefix).write_bytes(bytes(packed))
    save_sidecar(replace(load_sidecar(prefix), segmenter="jieba"), prefix)


@pytest.mark.parametrize("lookahead", [1, 7, 150])
def test_lookahead_follows_the_sample_and_wraps_around(directory, lookahead):
    seq_length = 16
    num_samples = (sum(map(len, GERMAN)) - 1) // seq_length
    data = section(directory, {"german": 1.0})
    plain = build(data, directory / "cache", num_samples)
    longer = build(data, directory / "cache", num_samples, lookahead=lookahead)
    # Both use the same index.
    assert len(list((directory / "cache").glob("blend-*"))) == 1
    batch = longer.batch(range(num_samples))
    expected = plain_epoch(GERMAN, seq_length, source_seed(0), lookahead)
    np.testing.assert_array_equal(batch.tokens.numpy(), np.stack(expected))
    assert torch.equal(batch.tokens[:, : seq_length + 1], plain.batch(range(num_samples)).tokens)
    assert batch.word_starts is None


def test_lookahead_longer_than_the_source(directory):
    tokens = sum(map(len, GERMAN))
    batch = build(section(directory, {"german": 1.0}), directory / "cache", 1, lookahead=2 * tokens).batch([0])
    stream = batch.tokens[0].numpy()
    np.testing.assert_array_equal(stream[:tokens], stream[tokens : 2 * tokens])
    assert sorted(stream[:tokens].tolist()) == sorted(np.concatenate(GERMAN).tolist())


def test_lookahead_excludes_held_out_documents(directory):
    data = section(directory, {"english": 1.0}, validation_fraction=0.25)
    batch = build(data, directory / "cache", 20, lookahead=3000).batch(range(20))
    seen = set(batch.tokens.unique().tolist())
    assert seen == set(np.concatenate(ENGLISH[:-15]).tolist())


def test_negative_lookahead(directory):
    with pytest.raises(ValueError, match="lookahead is -1"):
        build(section(directory, {"german": 1.0}), directory / "cache", lookahead=-1)


@pytest.mark.parametrize("lookahead", [0, 9, 2000])
def test_bits_match_their_tokens(directory, lookahead):
    """A blend of sources with and without bitmap, held-out documents, spans starting at any bit of a byte."""
    add_bitmap(directory / "english", ENGLISH)
    data = section(directory, {"english": 2.0, "german": 1.0}, validation_fraction=0.1)
    batch = build(data, directory / "cache", 90, lookahead=lookahead).batch(range(90))
    assert batch.word_starts is not None and batch.word_starts.dtype == torch.bool
    assert batch.word_starts.shape == batch.tokens.shape == (90, 17 + lookahead)
    english = batch.language == LANGUAGES.index("en")
    assert 0 < int(english.sum()) < 90
    assert not batch.word_starts[~english].any()
    np.testing.assert_array_equal(batch.word_starts[english].numpy(), starts_word(batch.tokens[english].numpy()))
    validation = ValidationSamples.build(data, languages=LANGUAGES, max_samples=9)
    assert validation.batch("en", [0])[0].word_starts is None


def test_bitmap_reads_any_range(tmp_path):
    document = np.arange(1, 78)
    write_dataset(tmp_path / "one", [document], "en")
    add_bitmap(tmp_path / "one", [document])
    expected = starts_word(document)
    bitmap = WordBitmap(tmp_path / "one", open_indexed(tmp_path / "one"), "jieba")
    for start in range(len(document) + 1):
        for count in range(len(document) - start + 1):
            np.testing.assert_array_equal(bitmap.read(0, start, count), expected[start : start + count])


@pytest.mark.parametrize(
    "damage, added",
    [("missing", None), ("short", -1), ("long", 1)],
)
def test_a_wrong_bitmap_is_rejected_before_the_run(directory, damage, added):
    add_bitmap(directory / "english", ENGLISH)
    path = words_path(directory / "english")
    content = path.read_bytes()
    tokens = sum(map(len, ENGLISH))
    if added is None:
        path.unlink()
        facts = ["english.words: file not found", "english.json"]
    else:
        path.write_bytes(content[:-1] if damage == "short" else content + b"\0")
        facts = [f"english.words: got {len(content) + added} bytes, expected {len(content)}", f"{tokens:,} tokens"]
    data = section(directory, {"english": 1.0}, validation_fraction=0.1)
    with user_error(*facts, "--segmenter jieba"):
        TrainPlan.read(data, num_samples=5, seed=1, languages=LANGUAGES, cache_dir=directory / "cache")
    # Validation does not use code-switching and does not need it.
    assert ValidationSamples.build(data, languages=LANGUAGES, max_samples=9).languages == ["en"]


def test_a_bitmap_not_in_the_sidecar_is_not_read(directory):
    words_path(directory / "german").write_bytes(b"of another dataset")
    assert build(section(directory, {"german": 1.0}), directory / "cache", 5).batch([0]).word_starts is None


def test_a_bitmap_is_read_for_its_own_source_only(directory):
    """Latin and German have documents of equal lengths: the bitmap of one must not be used for the other."""
    write_dataset(directory / "latin", LATIN, "la")
    add_bitmap(directory / "latin", LATIN)
    batch = build(section(directory, {"german": 1.0, "latin": 1.0}), directory / "cache", 30).batch(range(30))
    latin = batch.language == LANGUAGES.index("la")
    np.testing.assert_array_equal(batch.word_starts[latin].numpy(), starts_word(batch.tokens[latin].numpy()))
    assert batch.word_starts[latin].any() and not batch.word_starts[~latin].any()

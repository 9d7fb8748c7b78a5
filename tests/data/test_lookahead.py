"""Tokens behind a sample and the bits of the word bitmap, against plain reconstructions from the documents."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
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
from megatron_prealign.errors import UserError


@pytest.fixture
def directory(tmp_path) -> Path:
    write_dataset(tmp_path / "english", ENGLISH, "en")
    write_dataset(tmp_path / "german", GERMAN, "de")
    return tmp_path


def starts_word(tokens: np.ndarray) -> np.ndarray:
    """A bit for every token that tells the token: the ids of these datasets say which bit belongs to them."""
    return (tokens * 2_654_435_761 >> 7) & 1 == 1


def add_bitmap(prefix: Path, documents: list[np.ndarray]) -> None:
    # Bit by bit, to be independent of the packing that is tested.
    packed = bytearray(-(-sum(map(len, documents)) // 8))
    for index, bit in enumerate(starts_word(np.concatenate(documents)).tolist()):
        packed[index // 8] |= bit << index % 8
    words_path(prefix).write_bytes(bytes(packed))
    save_sidecar(replace(load_sidecar(prefix), segmenter="jieba"), prefix)


@pytest.mark.parametrize("lookahead", [1, 7, 150])
def test_lookahead_is_what_follows_and_goes_round(directory, lookahead):
    seq_length = 16
    num_samples = (sum(map(len, GERMAN)) - 1) // seq_length
    data = section(directory, {"german": 1.0})
    plain = build(data, directory / "cache", num_samples)
    longer = build(data, directory / "cache", num_samples, lookahead=lookahead)
    # The same index serves both.
    assert len(list((directory / "cache").glob("blend-*"))) == 1
    rows = longer.rows(range(num_samples))
    expected = plain_epoch(GERMAN, seq_length, source_seed(0), lookahead)
    np.testing.assert_array_equal(rows.tokens.numpy(), np.stack(expected))
    assert torch.equal(rows.tokens[:, : seq_length + 1], plain.rows(range(num_samples)).tokens)
    assert rows.word_starts is None


def test_lookahead_longer_than_the_whole_source(directory):
    tokens = sum(map(len, GERMAN))
    rows = build(section(directory, {"german": 1.0}), directory / "cache", 1, lookahead=2 * tokens).rows([0])
    stream = rows.tokens[0].numpy()
    np.testing.assert_array_equal(stream[:tokens], stream[tokens : 2 * tokens])
    assert sorted(stream[:tokens].tolist()) == sorted(np.concatenate(GERMAN).tolist())


def test_lookahead_stays_out_of_held_out_documents(directory):
    data = section(directory, {"english": 1.0}, validation_fraction=0.25)
    rows = build(data, directory / "cache", 20, lookahead=3000).rows(range(20))
    seen = set(rows.tokens.unique().tolist())
    assert seen == set(np.concatenate(ENGLISH[:-15]).tolist())


def test_negative_lookahead(directory):
    with pytest.raises(ValueError, match="lookahead is -1"):
        build(section(directory, {"german": 1.0}), directory / "cache", lookahead=-1)


@pytest.mark.parametrize("lookahead", [0, 9, 2000])
def test_bits_belong_to_their_tokens(directory, lookahead):
    """Sources with a bitmap and without one in one blend, held-out documents, spans that start in any bit of a byte."""
    add_bitmap(directory / "english", ENGLISH)
    data = section(directory, {"english": 2.0, "german": 1.0}, validation_fraction=0.1)
    rows = build(data, directory / "cache", 90, lookahead=lookahead).rows(range(90))
    assert rows.word_starts is not None and rows.word_starts.dtype == torch.bool
    assert rows.word_starts.shape == rows.tokens.shape == (90, 17 + lookahead)
    english = rows.language == LANGUAGES.index("en")
    assert 0 < int(english.sum()) < 90
    assert not rows.word_starts[~english].any()
    np.testing.assert_array_equal(rows.word_starts[english].numpy(), starts_word(rows.tokens[english].numpy()))
    validation = ValidationSamples.build(data, languages=LANGUAGES, max_samples=9)
    assert validation.rows("en", [0])[0].word_starts is None


def test_bitmap_reads_any_stretch(tmp_path):
    document = np.arange(1, 78)
    write_dataset(tmp_path / "one", [document], "en")
    add_bitmap(tmp_path / "one", [document])
    expected = starts_word(document)
    bitmap = WordBitmap(tmp_path / "one", open_indexed(tmp_path / "one"), "jieba")
    for start in range(len(document) + 1):
        for count in range(len(document) - start + 1):
            np.testing.assert_array_equal(bitmap.read(0, start, count), expected[start : start + count])


@pytest.mark.parametrize(
    "damage, message",
    [
        ("missing", r"english\.words: no such file, but english\.json says that segmenter jieba .* --segmenter jieba"),
        ("short", r"english\.words: \d+ bytes, expected \d+, one bit for each of [\d,]+ tokens; .* --segmenter jieba"),
        ("long", r"english\.words: \d+ bytes, expected \d+, one bit"),
    ],
)
def test_a_wrong_bitmap_is_refused_before_the_run(directory, damage, message):
    add_bitmap(directory / "english", ENGLISH)
    path = words_path(directory / "english")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "short" else content + b"\0")
    data = section(directory, {"english": 1.0}, validation_fraction=0.1)
    with pytest.raises(UserError, match=message):
        TrainPlan.read(data, num_samples=5, seed=1, languages=LANGUAGES, cache_dir=directory / "cache")
    # Validation does not switch words and does not need it.
    assert ValidationSamples.build(data, languages=LANGUAGES, max_samples=9).languages == ["en"]


def test_a_bitmap_that_the_sidecar_does_not_name_is_not_read(directory):
    words_path(directory / "german").write_bytes(b"of another dataset")
    assert build(section(directory, {"german": 1.0}), directory / "cache", 5).rows([0]).word_starts is None


def test_a_bitmap_is_read_for_its_own_source_only(directory):
    """Latin and German have documents of equal lengths: a bitmap of one must not be read for the other."""
    write_dataset(directory / "latin", LATIN, "la")
    add_bitmap(directory / "latin", LATIN)
    rows = build(section(directory, {"german": 1.0, "latin": 1.0}), directory / "cache", 30).rows(range(30))
    latin = rows.language == LANGUAGES.index("la")
    np.testing.assert_array_equal(rows.word_starts[latin].numpy(), starts_word(rows.tokens[latin].numpy()))
    assert rows.word_starts[latin].any() and not rows.word_starts[~latin].any()

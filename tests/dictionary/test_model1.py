"""IBM model 1 against its definition, word by word in Python."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from megatron_prealign.dictionary.model1 import Model1, Sentences, make_sentences
from megatron_prealign.dictionary.ragged import offsets_of
from megatron_prealign.progress import Progress

NULL = -1
Pairs = list[tuple[list[int], list[int]]]
Table = dict[tuple[int, int], float]
# House, book, the, a: the example of Brown et al. and of every course, which has one right answer.
HOUSE_BOOK: Pairs = [([0, 1], [0, 1]), ([0, 2], [0, 2]), ([3, 2], [3, 2])]


def sentences_of(pairs: Pairs, vocabulary: tuple[int, int]) -> tuple[Sentences, Sentences]:
    sides = []
    for number, size in enumerate(vocabulary):
        rows = [pair[number] for pair in pairs]
        running = np.array([word for row in rows for word in row], dtype=np.int32)
        sides.append(make_sentences(running, offsets_of(np.array([len(row) for row in rows])), size))
    return sides[0], sides[1]


def plain_model1(pairs: Pairs, given: int, iterations: int) -> tuple[Table, Table]:
    """t(predicted | given) with a null word, and the expected counts of the last iteration, in float64."""
    predicted_words = {word for pair in pairs for word in pair[1 - given]}
    table: Table = defaultdict(lambda: 1 / len(predicted_words))
    counts: Table = {}
    for _ in range(iterations):
        counts = defaultdict(float)
        totals: dict[int, float] = defaultdict(float)
        for pair in pairs:
            for word in pair[1 - given]:
                explanations = [NULL, *pair[given]]
                total = sum(table[each, word] for each in explanations)
                for each in explanations:
                    counts[each, word] += table[each, word] / total
                    totals[each] += table[each, word] / total
        table = {key: count / totals[key[0]] for key, count in counts.items()}
    return table, counts


def random_pairs(seed: int, number: int, vocabulary: int = 12) -> Pairs:
    """Sentences of one to nine words, with repeated words."""
    generator = np.random.default_rng(seed)

    def sentence() -> list[int]:
        return (generator.random(generator.integers(1, 10)) ** 2 * vocabulary).astype(int).tolist()

    return [(sentence(), sentence()) for _ in range(number)]


def trained(
    pairs: Pairs, vocabulary: tuple[int, int], given: int, iterations: int, scratch: Path
) -> tuple[Table, Table]:
    with (
        Model1(*sentences_of(pairs, vocabulary), scratch, block_links=50) as model,
        Progress("x", enabled=False) as progress,
    ):
        probability, count = model.train(given, iterations, progress)
        words = list(zip(model.source.tolist(), model.target.tolist(), strict=True))
    keys = [pair if given == 0 else pair[::-1] for pair in words]
    return dict(zip(keys, probability.tolist(), strict=True)), dict(zip(keys, count.tolist(), strict=True))


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("pairs", [HOUSE_BOOK, random_pairs(0, 60)], ids=["house-book", "random"])
def test_equal_to_the_definition(pairs: Pairs, iterations: int, given: int, tmp_path: Path) -> None:
    expected, expected_counts = plain_model1(pairs, given, iterations)
    probability, count = trained(pairs, (12, 12), given, iterations, tmp_path)
    assert probability.keys() == {key for key in expected if key[0] != NULL}
    for key, value in probability.items():
        # Probabilities are float32 (6e-8) and enter every iteration; the sums are float64.
        assert value == pytest.approx(expected[key], rel=1e-5, abs=1e-12)
        assert count[key] == pytest.approx(expected_counts[key], rel=1e-5, abs=1e-12)


def test_known_translations_win(tmp_path: Path) -> None:
    probability, _ = trained(HOUSE_BOOK, (4, 4), 0, 20, tmp_path)
    for word in range(4):
        best = max((key for key in probability if key[0] == word), key=probability.__getitem__)
        assert best == (word, word)


def test_the_null_word_explains_what_has_no_counterpart(tmp_path: Path) -> None:
    """A word that is in every target sentence, and in no source sentence, is no translation of any word."""
    pairs: Pairs = [([word], [word, 9]) for word in range(8) for _ in range(3)]
    probability, count = trained(pairs, (8, 10), 0, 20, tmp_path)
    assert all(probability[word, word] > 0.95 for word in range(8))
    # Without a null word, half of each probability and all 24 occurrences.
    assert sum(count[word, 9] for word in range(8)) < 1


def test_blocks_do_not_change_the_result(tmp_path: Path) -> None:
    sides = sentences_of(random_pairs(1, 80), (12, 12))
    results = []
    for block_links in (1, 7, 64, 1 << 20):
        with Model1(*sides, tmp_path, block_links) as model:
            results.append(model.translations(4, 0.1, 1e-6))
    assert len(results[0].source) > 20
    for other in results[1:]:
        for values, others in zip(results[0], other, strict=True):
            assert np.array_equal(values, others)
    assert list(tmp_path.iterdir()) == []


def test_translations_reach_both_thresholds(tmp_path: Path) -> None:
    sides = sentences_of(random_pairs(2, 80), (12, 12))
    with Model1(*sides, tmp_path) as model:
        everything = model.translations(3, 1e-9, 1e-9)
        some = model.translations(3, 5.0, 0.02)
    kept = (everything.expected >= 5.0) & (everything.probability >= 0.02)
    assert 0 < kept.sum() < len(kept)
    # Each threshold alone would keep more.
    assert kept.sum() < min((everything.expected >= 5.0).sum(), (everything.probability >= 0.02).sum())
    for values, others in zip(everything, some, strict=True):
        assert np.array_equal(values[kept], others)
    # Whichever direction expects fewer: their counts differ, so some of these thresholds divide them.
    for min_count in np.arange(0.5, 6, 0.5).tolist():
        with Model1(*sides, tmp_path) as model:
            found = model.translations(3, min_count, 1e-9)
        assert len(found.source) == (everything.expected >= min_count).sum()


def test_sentences_are_cut_into_blocks_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    running, offsets = np.array([3, 1, 3, 0, 2, 2, 2, 1], np.int32), np.array([0, 3, 4, 8])
    whole = make_sentences(running, offsets, 4)
    assert whole.word.tolist() == [1, 3, 0, 1, 2] and whole.times.tolist() == [1, 2, 1, 1, 3]
    assert whole.offsets.tolist() == [0, 2, 3, 5]
    monkeypatch.setattr("megatron_prealign.dictionary.model1._BLOCK_WORDS", 1)
    for values, others in zip(whole, make_sentences(running, offsets, 4), strict=True):
        assert np.array_equal(values, others)

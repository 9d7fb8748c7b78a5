"""Sampling of a multilingual corpus: fractions, sampled documents and held-out documents."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_prealign.preprocess.fertility import MeasuredText
from megatron_prealign.preprocess.sampling import HELD_OUT_BYTES, Corpus, SampledDocument, TextCount, plan_sampling

COUNTS = {"big": TextCount(100_000, 64_000_000), "mid": TextCount(10_000, 4_000_000), "low": TextCount(1000, 250_000)}


def write(directory: Path, language: str, texts: list[str]) -> str:
    path = directory / f"{language}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"{path}:{language}"


def sample_documents(
    corpus: Corpus, temperature: float, sample_bytes: int, held_out: float, seed: int = 0
) -> list[SampledDocument]:
    sampling = plan_sampling(corpus.count(False), temperature, sample_bytes, held_out)
    return list(corpus.sample(sampling, seed, False))


@pytest.mark.parametrize(
    ("temperature", "weights"),
    # Powers 1 and 1/2 of the bytes; with a large temperature all languages are equal.
    [(1.0, [256, 16, 1]), (2.0, [16, 4, 1]), (1e9, [1, 1, 1]), (0.5, [65536, 256, 1])],
)
def test_fractions(temperature: float, weights: list[int]) -> None:
    sampling = plan_sampling(COUNTS, temperature, 1_000_000, 0.0)
    for (language, rule), weight in zip(sampling.items(), weights, strict=True):
        assert rule.fraction == pytest.approx(weight / sum(weights), rel=1e-6)
        # Sampling does not depend on document size: times * bytes is the sampled text.
        assert rule.times * COUNTS[language].bytes == pytest.approx(1_000_000 * rule.fraction)


def test_held_out_documents_are_excluded_from_the_fractions() -> None:
    for language, rule in plan_sampling(COUNTS, 1e12, 300_000, 0.05).items():
        remaining = COUNTS[language].bytes * (1 - 1 / rule.block)
        assert rule.times * remaining == pytest.approx(100_000)


def test_few_documents_are_used_for_both_training_and_measuring(tmp_path: Path) -> None:
    corpus = Corpus.open([write(tmp_path, "a", ["one", "two", "three"])], ("text",), "stop")
    sample = sample_documents(corpus, 1, 10**9, 0.05)
    assert [(document.copies, document.measured) for document in sample] == [(1, True)] * 3


def test_measured_text_is_bounded() -> None:
    measured = MeasuredText(held_out=True)
    for _ in range(3):
        measured.add(SampledDocument("en", "x" * 1_500_000, "a:1", 0, True))
    assert [len(text) for text in measured.texts] == [1_500_000, 500_000]
    assert (measured.bytes, len(measured.places)) == (2 * HELD_OUT_BYTES, 2)


def test_a_small_corpus_is_sampled_completely() -> None:
    assert [rule.times for rule in plan_sampling(COUNTS, 1.0, 10**15, 0.0).values()] == [1.0, 1.0, 1.0]
    assert [rule.times for rule in plan_sampling(COUNTS, 1.0, 10**15, 0.05).values()] == [1.0, 1.0, 1.0]


def test_blocks_bound_the_held_out_text() -> None:
    sampling = plan_sampling(COUNTS | {"few": TextCount(39, 10)}, 1.0, 1_000_000, 0.05)
    assert {language: rule.block for language, rule in sampling.items()} == {"big": 64, "mid": 20, "low": 20, "few": 1}
    assert [rule.held_out for rule in sampling.values()] == [True, True, True, False]
    assert not any(rule.held_out for rule in plan_sampling(COUNTS, 1.0, 1_000_000, 0.0).values())
    # A language with few long documents still has one to measure on.
    assert plan_sampling({"x": TextCount(3, 10 * HELD_OUT_BYTES)}, 1.0, 1_000_000, 0.05)["x"].block == 3


def test_sampled_documents(tmp_path: Path) -> None:
    inputs = [
        write(tmp_path, "big", [f"big {n} " + "x" * (n % 90) for n in range(4000)]),
        write(tmp_path, "low", [f"low {n} " + "x" * (n % 90) for n in range(400)]),
    ]
    corpus = Corpus.open(inputs, ("text",), "stop")
    counts = corpus.count(False)
    sampled = sample_documents(corpus, 1e9, 40_000, 0.05)
    sample = Counter({document.text: document.copies for document in sampled if document.copies})
    for language in ("big", "low"):
        size = sum(len(text) * copies for text, copies in sample.items() if text.startswith(language))
        assert size == pytest.approx(20_000, rel=0.2)
        held_out = [document.text for document in sampled if document.measured and document.language == language]
        # One of every twenty, and none of them is in the sample.
        numbers = [int(text.split()[1]) for text in held_out]
        assert [number // 20 for number in numbers] == list(range(counts[language].documents // 20))
        assert len({number % 20 for number in numbers}) > 5
        assert not set(held_out) & set(sample)
    # The small language has less text than its fraction: some documents are repeated, at most once.
    assert {copies for text, copies in sample.items() if text.startswith("low")} == {1, 2}
    # Sampled from the complete file, not from its start.
    numbers = [int(text.split()[1]) for text in sample if text.startswith("big")]
    assert 0.4 < sum(number < 2000 for number in numbers) / len(numbers) < 0.6


def test_the_sample_depends_only_on_seed_and_language(tmp_path: Path) -> None:
    first = write(tmp_path, "a", [f"text {n}" for n in range(500)])
    second = write(tmp_path, "b", [f"text {n}" for n in range(500)])
    both = sample_documents(Corpus.open([first, second], ("text",), "stop"), 1, 2000, 0.05)
    assert both == sample_documents(Corpus.open([first, second], ("text",), "stop"), 1, 2000, 0.05)
    reversed_order = sample_documents(Corpus.open([second, first], ("text",), "stop"), 1, 2000, 0.05)
    by_language = [[one for one in sample if one.language == "a"] for sample in (both, reversed_order)]
    assert by_language[0] == by_language[1]
    texts = [{one.text for one in both if one.language == language} for language in "ab"]
    assert texts[0] != texts[1]
    other = sample_documents(Corpus.open([first, second], ("text",), "stop"), 1, 2000, 0.05, seed=1)
    assert {one.text for one in other} != {one.text for one in both}


def test_files_of_a_language_are_combined(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write(tmp_path, name, [f"{name} {n}" for n in range(50)])
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "z", ["z"])
    corpus = Corpus.open([f"{tmp_path}/*.jsonl:de", f"{tmp_path}/sub"], ("text",), "stop")
    assert corpus.languages == ["de", "und"]
    assert {language: count.documents for language, count in corpus.count(False).items()} == {"de": 100, "und": 1}

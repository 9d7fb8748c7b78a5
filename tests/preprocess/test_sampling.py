"""The sample of a corpus of several languages: shares, draws and what is held out."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_prealign.preprocess.fertility import MeasuredText
from megatron_prealign.preprocess.sampling import HELD_OUT_BYTES, Corpus, Drawn, TextCount, plan_shares

COUNTS = {"big": TextCount(100_000, 64_000_000), "mid": TextCount(10_000, 4_000_000), "low": TextCount(1000, 250_000)}


def write(directory: Path, language: str, texts: list[str]) -> str:
    path = directory / f"{language}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"{path}:{language}"


def draws(corpus: Corpus, temperature: float, sample_bytes: int, held_out: float, seed: int = 0) -> list[Drawn]:
    shares = plan_shares(corpus.count(False), temperature, sample_bytes, held_out)
    return list(corpus.draw(shares, seed, False))


@pytest.mark.parametrize(
    ("temperature", "parts"),
    # Powers 1 and 1/2 of the bytes; far above all languages are alike.
    [(1.0, [256, 16, 1]), (2.0, [16, 4, 1]), (1e9, [1, 1, 1]), (0.5, [65536, 256, 1])],
)
def test_shares(temperature: float, parts: list[int]) -> None:
    shares = plan_shares(COUNTS, temperature, 1_000_000, 0.0)
    for (language, share), part in zip(shares.items(), parts, strict=True):
        assert share.part == pytest.approx(part / sum(parts), rel=1e-6)
        # Documents of all sizes are drawn alike: so many times bytes is the share.
        assert share.times * COUNTS[language].bytes == pytest.approx(1_000_000 * share.part)


def test_shares_are_of_what_is_not_held_out() -> None:
    for language, share in plan_shares(COUNTS, 1e12, 300_000, 0.05).items():
        left = COUNTS[language].bytes * (1 - 1 / share.block)
        assert share.times * left == pytest.approx(100_000)


def test_few_documents_are_both_learnt_from_and_measured_on(tmp_path: Path) -> None:
    found = draws(Corpus.open([write(tmp_path, "a", ["one", "two", "three"])], ("text",), "stop"), 1, 10**9, 0.05)
    assert [(drawn.copies, drawn.measured) for drawn in found] == [(1, True)] * 3


def test_what_is_measured_on_is_bounded() -> None:
    measured = MeasuredText(held_out=True)
    for _ in range(3):
        measured.add(Drawn("en", "x" * 1_500_000, "a:1", 0, True))
    assert [len(text) for text in measured.texts] == [1_500_000, 500_000]
    assert (measured.bytes, len(measured.places)) == (2 * HELD_OUT_BYTES, 2)


def test_a_small_corpus_is_taken_whole() -> None:
    assert [share.times for share in plan_shares(COUNTS, 1.0, 10**15, 0.0).values()] == [1.0, 1.0, 1.0]
    assert [share.times for share in plan_shares(COUNTS, 1.0, 10**15, 0.05).values()] == [1.0, 1.0, 1.0]


def test_blocks_bound_what_is_held_out() -> None:
    shares = plan_shares(COUNTS | {"few": TextCount(39, 10)}, 1.0, 1_000_000, 0.05)
    assert {language: share.block for language, share in shares.items()} == {"big": 64, "mid": 20, "low": 20, "few": 1}
    assert [share.held_out for share in shares.values()] == [True, True, True, False]
    assert not any(share.held_out for share in plan_shares(COUNTS, 1.0, 1_000_000, 0.0).values())
    # A language of few long documents has one to measure on, at any rate.
    assert plan_shares({"x": TextCount(3, 10 * HELD_OUT_BYTES)}, 1.0, 1_000_000, 0.05)["x"].block == 3


def test_draws(tmp_path: Path) -> None:
    inputs = [
        write(tmp_path, "big", [f"big {n} " + "x" * (n % 90) for n in range(4000)]),
        write(tmp_path, "low", [f"low {n} " + "x" * (n % 90) for n in range(400)]),
    ]
    corpus = Corpus.open(inputs, ("text",), "stop")
    counts = corpus.count(False)
    found = draws(corpus, 1e9, 40_000, 0.05)
    sample = Counter({drawn.text: drawn.copies for drawn in found if drawn.copies})
    for language in ("big", "low"):
        size = sum(len(text) * copies for text, copies in sample.items() if text.startswith(language))
        assert size == pytest.approx(20_000, rel=0.2)
        kept = [drawn.text for drawn in found if drawn.measured and drawn.language == language]
        # One of every twenty, and none of them is learnt from.
        numbers = [int(text.split()[1]) for text in kept]
        assert [number // 20 for number in numbers] == list(range(counts[language].documents // 20))
        assert len({number % 20 for number in numbers}) > 5
        assert not set(kept) & set(sample)
    # Of the small language there is less than its share: some come twice, none more often.
    assert {copies for text, copies in sample.items() if text.startswith("low")} == {1, 2}
    # Spread over the whole file, not taken from its start.
    numbers = [int(text.split()[1]) for text in sample if text.startswith("big")]
    assert 0.4 < sum(number < 2000 for number in numbers) / len(numbers) < 0.6


def test_draws_depend_on_seed_and_language_alone(tmp_path: Path) -> None:
    first = write(tmp_path, "a", [f"text {n}" for n in range(500)])
    second = write(tmp_path, "b", [f"text {n}" for n in range(500)])
    both = draws(Corpus.open([first, second], ("text",), "stop"), 1, 2000, 0.05)
    assert both == draws(Corpus.open([first, second], ("text",), "stop"), 1, 2000, 0.05)
    turned = draws(Corpus.open([second, first], ("text",), "stop"), 1, 2000, 0.05)
    by_language = [[drawn for drawn in found if drawn.language == "a"] for found in (both, turned)]
    assert by_language[0] == by_language[1]
    texts = [{drawn.text for drawn in both if drawn.language == language} for language in "ab"]
    assert texts[0] != texts[1]
    other = draws(Corpus.open([first, second], ("text",), "stop"), 1, 2000, 0.05, seed=1)
    assert {drawn.text for drawn in other} != {drawn.text for drawn in both}


def test_files_of_a_language_are_one(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write(tmp_path, name, [f"{name} {n}" for n in range(50)])
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "z", ["z"])
    corpus = Corpus.open([f"{tmp_path}/*.jsonl:de", f"{tmp_path}/sub"], ("text",), "stop")
    assert corpus.languages == ["de", "und"]
    assert {language: count.documents for language, count in corpus.count(False).items()} == {"de": 100, "und": 1}

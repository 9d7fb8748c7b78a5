"""Blends that change on resume: every source continues where it stopped, and no sample repeats within its epoch."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.messages import assert_facts, user_error
from support.sidecars import save_sidecar
from support.token_datasets import ENGLISH, EOD, GERMAN, LATIN, build, make_documents, section, write_dataset

from megatron_prealign.data.blend import SavedBlend
from megatron_prealign.data.samples import TrainSamples
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.recipe.data import DataSection, DataSource

CHECKPOINT = Path("run/checkpoints/step_00000005")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, documents, language in (("english", ENGLISH, "en"), ("german", GERMAN, "de"), ("latin", LATIN, "la")):
        write_dataset(tmp_path / name, documents, language)
    return tmp_path


def saved(samples: TrainSamples, position: int) -> SavedBlend:
    """The blend saved in a checkpoint at `position`, after a round trip through JSON."""
    summary = {"blend": samples.blend_state(position), "train_state": {"consumed_samples": position}}
    return SavedBlend.from_state(CHECKPOINT, json.loads(json.dumps(summary)))


def tokens_of(samples: TrainSamples, start: int, stop: int) -> list[tuple[int, bytes]]:
    """(language, tokens) of each sample in a range of the run."""
    batch = samples.batch(range(start, stop))
    return [
        (int(language), sample.numpy().tobytes()) for language, sample in zip(batch.language, batch.tokens, strict=True)
    ]


def epoch_of(documents: Sequence[np.ndarray], seq_length: int = 16) -> int:
    return (sum(map(len, documents)) - 1) // seq_length


@pytest.mark.parametrize("seed", range(6))
def test_nothing_repeats_before_its_epoch_ends(directory: Path, tmp_path: Path, seed: int) -> None:
    """Weights, the list of sources and their order change at random positions, over many epochs."""
    random = np.random.default_rng(seed)
    seen: list[tuple[int, bytes]] = []
    before, position = None, 0
    for _ in range(6):
        names = random.permutation(["english", "german", "latin"])[: random.integers(1, 4)].tolist()
        weights = dict(zip(names, random.dirichlet([1.0] * len(names)).tolist(), strict=True))
        stop = position + int(random.integers(1, 90))
        samples = build(section(directory, weights), tmp_path / "cache", stop + 5, saved=before)
        assert samples.batch(range(position, stop)).sample_id.tolist() == list(range(position, stop))
        seen += tokens_of(samples, position, stop)
        before, position = saved(samples, stop), stop
        consumed = Counter(language for language, _ in seen)
        codes = {"en": 1, "de": 0, "la": 2}
        known = [*before.blend.sources, *before.blend.dropped]
        counts = [*before.consumed, *(source.consumed_at_start for source in before.blend.dropped)]
        assert {codes[source.language]: count for source, count in zip(known, counts, strict=True) if count} == consumed
    # Later epochs of a source cut its documents into other samples: only within an epoch is every sample unique.
    for language, documents in ((1, ENGLISH), (0, GERMAN), (2, LATIN)):
        own = [sample for number, sample in seen if number == language]
        size = epoch_of(documents)
        for start in range(0, len(own), size):
            part = own[start : start + size]
            assert len(set(part)) == len(part)


def test_each_source_continues_in_its_own_order(directory: Path, tmp_path: Path) -> None:
    """A change of the blend does not affect the sample order of a source."""
    alone = tokens_of(build(section(directory, {"english": 1.0}), tmp_path / "cache", 300), 0, 300)
    first = build(section(directory, {"english": 3.0, "german": 1.0}), tmp_path / "cache", 120)
    second = build(
        section(directory, {"english": 1.0, "german": 9.0}), tmp_path / "cache", 250, saved=saved(first, 100)
    )
    third = build(section(directory, {"english": 1.0}), tmp_path / "cache", 300, saved=saved(second, 200))
    seen = tokens_of(first, 0, 100) + tokens_of(second, 100, 200) + tokens_of(third, 200, 300)
    english = [sample for sample in seen if sample[0] == 1]
    assert english == alone[: len(english)]
    counts = Counter(language for language, _ in seen[100:200])
    assert counts == {1: 10, 0: 90}


def test_unchanged_blend_is_the_same_index(directory: Path, tmp_path: Path) -> None:
    data = section(directory, {"english": 2.0, "german": 1.0})
    original = build(data, tmp_path / "cache", 80)
    resumed = build(data, tmp_path / "cache", 80, saved=saved(original, 33))
    assert len(list((tmp_path / "cache").glob("blend-*"))) == 1
    assert tokens_of(resumed, 0, 80) == tokens_of(original, 0, 80)
    # Also after a change: a later resume finds the blend that started there.
    other = section(directory, {"english": 1.0, "german": 1.0})
    changed = build(other, tmp_path / "cache", 80, saved=saved(original, 33))
    again = build(other, tmp_path / "cache", 80, saved=saved(changed, 50))
    assert len(list((tmp_path / "cache").glob("blend-*"))) == 2
    assert again.blend == changed.blend and again.blend.start == 33
    assert tokens_of(again, 50, 80) == tokens_of(changed, 50, 80)
    assert again.consumed_per_source(80) == changed.consumed_per_source(80)
    # A longer run starts with the samples of the shorter one.
    longer = build(other, tmp_path / "cache", 200, saved=saved(changed, 50))
    assert tokens_of(longer, 33, 80) == tokens_of(changed, 33, 80)
    with pytest.raises(IndexError, match="sample 32 .* 33"):
        longer.batch([32])
    with pytest.raises(ValueError, match="num_samples is 32, expected 33 to 200"):
        longer.consumed_per_source(32)


def test_a_source_that_is_added_again_continues(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = build(section(directory, {"english": 1.0, "german": 1.0}), tmp_path / "cache", 40)
    with caplog.at_level(logging.WARNING):
        second = build(
            section(directory, {"english": 1.0, "latin": 1.0}), tmp_path / "cache", 80, saved=saved(first, 40)
        )
    changed, dropped = (record.getMessage() for record in caplog.records)
    english, german, latin = (str(directory / name) for name in ("english", "german", "latin"))
    assert_facts(
        changed,
        CHECKPOINT,
        "sample 40",
        f"{english} (weight 1 -> 1, 20 samples consumed), {latin} (weight 1, 0 samples consumed, new)",
    )
    size = epoch_of(GERMAN)
    assert_facts(dropped, german, "data.sources", f"{size - 20} of its {size} samples")
    assert second.consumed_per_source(60) == {english: 30, latin: 10, german: 20}
    third = build(section(directory, {"german": 1.0}), tmp_path / "cache", 100, saved=saved(second, 60))
    expected = tokens_of(build(section(directory, {"english": 1.0, "german": 1.0}), tmp_path / "cache", 70), 40, 70)
    assert tokens_of(third, 60, 63) == [sample for sample in expected if sample[0] == 0][:3]
    assert third.consumed_per_source(63) == {german: 23, english: 30, latin: 10}


def moved(directory: Path, name: str) -> DataSource:
    target = directory / "elsewhere"
    target.mkdir(exist_ok=True)
    for ending in ("bin", "idx", "json"):
        shutil.move(directory / f"{name}.{ending}", target / f"{name}.{ending}")
    return DataSource(path=str(target / name), language=load_sidecar(target / name).language)


def test_moved_sources_are_identified_by_their_content(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = section(directory, {"english": 1.0, "german": 1.0})
    original = build(data, tmp_path / "cache", 60)
    expected = tokens_of(original, 0, 60)
    before = saved(original, 20)
    data = replace(data, sources=[moved(directory, "english"), data.sources[1]])
    with caplog.at_level(logging.WARNING):
        samples = build(data, tmp_path / "cache", 60, saved=before)
    (record,) = caplog.records
    assert_facts(
        record.getMessage(),
        f"data.sources moved since {CHECKPOINT}",
        f"{directory / 'english'} to {directory / 'elsewhere' / 'english'}",
    )
    assert tokens_of(samples, 0, 60) == expected
    assert list(samples.consumed_per_source(60)) == [
        str(directory / "elsewhere" / "english"),
        str(directory / "german"),
    ]


def test_swapped_files_are_distinguished_by_their_checksums(directory: Path, tmp_path: Path) -> None:
    """Documents of the same lengths and language: only the token checksums differ."""
    for number, name in enumerate("ab"):
        write_dataset(tmp_path / name, [document + number * (document != EOD) for document in GERMAN], "de")
        save_sidecar(replace(load_sidecar(tmp_path / name), checksums={"bin": f"xxh3:{name}"}), tmp_path / name)

    def data(*names: str) -> DataSection:
        sources = [DataSource(path=str(tmp_path / name), language="de") for name in names]
        return replace(section(directory, {"german": 1.0}), sources=sources)

    expected = tokens_of(build(data("a", "b"), tmp_path / "cache", 40), 0, 40)
    before = saved(build(data("a", "b"), tmp_path / "cache", 40), 10)
    for ending in ("bin", "idx", "json"):
        shutil.move(tmp_path / f"a.{ending}", tmp_path / f"c.{ending}")
        shutil.move(tmp_path / f"b.{ending}", tmp_path / f"a.{ending}")
        shutil.move(tmp_path / f"c.{ending}", tmp_path / f"b.{ending}")
    assert tokens_of(build(data("b", "a"), tmp_path / "cache", 40, saved=before), 0, 40) == expected


CHANGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "more documents": (
        lambda prefix: write_dataset(prefix, [*GERMAN, *make_documents(2, 70_000, seed=4)], "de"),
        ["got 27 documents and {more} tokens in de", "expected 25 and {tokens} in de"],
    ),
    "other text": (
        lambda prefix: save_sidecar(replace(load_sidecar(prefix), checksums={"bin": "xxh3:other"}), prefix),
        ["got 25 documents and {tokens} tokens in de", "expected 25 and {tokens} in de with other content"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_source_is_rejected_with_its_counts(directory: Path, tmp_path: Path, change: str) -> None:
    prefix = directory / "german"
    save_sidecar(replace(load_sidecar(prefix), checksums={"bin": "xxh3:first"}), prefix)
    data = section(directory, {"english": 3.0, "german": 1.0})
    before = saved(build(data, tmp_path / "cache", 60), 40)
    CHANGES[change][0](prefix)
    counts = {"tokens": f"{sum(map(len, GERMAN)):,}", "more": f"{load_sidecar(prefix).tokens:,}"}
    facts = [fact.format(**counts) for fact in CHANGES[change][1]]
    with user_error(CHECKPOINT, prefix, "10 of its samples", *facts, "restore the dataset", "checkpoint.directory"):
        build(data, tmp_path / "cache", 60, saved=before)


def test_other_held_out_documents_are_rejected(directory: Path, tmp_path: Path) -> None:
    before = saved(build(section(directory, {"english": 1.0}, validation_fraction=0.1), tmp_path / "cache", 30), 30)
    with user_error(
        CHECKPOINT,
        directory / "english",
        "got 48 training documents and ",
        "expected 54 and ",
        "data.validation_fraction and data.validation",
    ):
        build(section(directory, {"english": 1.0}, validation_fraction=0.2), tmp_path / "cache", 60, saved=before)


def test_a_finished_run_can_be_opened_with_another_blend(directory: Path, tmp_path: Path) -> None:
    first = build(section(directory, {"english": 1.0, "german": 1.0}), tmp_path / "cache", 40)
    samples = build(section(directory, {"english": 1.0}), tmp_path / "cache", 40, saved=saved(first, 40))
    assert samples.blend_state(40)["consumed"] == {"0": 20}


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda blend: blend.pop(name)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no start": (without("start"), "blend is corrupt (KeyError: 'start')"),
    "no source": (lambda blend: blend["sources"].pop(), "blend counts do not add up: its sources provided 0 of the 0 "),
    "counts": (lambda blend: blend["consumed"].update({"0": 7}), "0 of the 0 samples before its start and 17 of 20"),
    "negative": (
        lambda blend: blend["consumed"].update({"0": -1}),
        "blend counts must be integers >= 0, got start 0, consumed [-1, ",
    ),
    "text": (lambda blend: blend["sources"][0].update(tokens="9"), "blend.sources: tokens is '9', expected"),
    "empty epoch": (lambda blend: blend["sources"][0].update(samples_per_epoch=0), "samples_per_epoch of"),
    "unknown": (lambda blend: blend["sources"][0].update(more=1), "blend is corrupt (TypeError"),
    "twice": (
        lambda blend: blend["dropped"].append({**blend["sources"][0], "consumed_at_start": 0}),
        "blend lists a source twice",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_corrupt_counts_are_reported(directory: Path, tmp_path: Path, case: str) -> None:
    blend = build(section(directory, {"english": 1.0, "german": 1.0}), tmp_path / "cache", 40).blend_state(20)
    change, expected = DAMAGE[case]
    change(blend)
    with pytest.raises(ValueError) as caught:
        SavedBlend.from_state(CHECKPOINT, {"blend": blend, "train_state": {"consumed_samples": 20}})
    assert expected in str(caught.value)


@pytest.mark.slow
def test_a_source_of_few_samples_and_many_epochs(tmp_path: Path) -> None:
    """Three samples per epoch, a thousand epochs: reading can start in the middle of any of them."""
    path = write_dataset(tmp_path / "small", make_documents(6, 1, seed=9), "en")
    data = replace(section(tmp_path, {"english": 1.0}), sources=[DataSource(path=path, language="en")], seq_length=30)
    samples = build(data, tmp_path / "cache", 3000)
    size = samples.blend.sources[0].samples_per_epoch
    assert 2 <= size <= 6
    tokens = samples.batch(range(2500, 3000)).tokens
    later = build(data, tmp_path / "cache", 4000, saved=replace(saved(samples, 2500)))
    assert torch.equal(later.batch(range(2500, 3000)).tokens, tokens)


def test_blends_with_different_histories_have_different_indices(directory: Path, tmp_path: Path) -> None:
    """The same sources, weights and length from here on, but different histories: each has its own index."""
    german, both = section(directory, {"german": 1.0}), section(directory, {"german": 1.0, "english": 1.0})
    first = build(both, tmp_path / "cache", 60)
    latin = section(directory, {"latin": 1.0})
    late, early = (build(latin, tmp_path / "cache", 60, saved=saved(first, at)) for at in (20, 10))
    assert tokens_of(early, 10, 50) == tokens_of(late, 20, 60)
    uneven = build(section(directory, {"german": 1.0, "english": 4.0}), tmp_path / "cache", 60)
    expected = tokens_of(build(german, tmp_path / "cache", 100), 0, 100)
    # 12 are in the first epoch, 30 in the second.
    for samples, consumed in ((uneven, 12), (first, 30)):
        later = build(german, tmp_path / "cache", 100, saved=saved(samples, 60))
        assert tokens_of(later, 60, 100) == expected[consumed : consumed + 40]


def test_two_copies_of_a_dataset_are_distinguished_by_their_paths(directory: Path, tmp_path: Path) -> None:
    copy = write_dataset(directory / "copy", GERMAN, "de")
    data = section(directory, {"german": 3.0})
    sources = [data.sources[0], DataSource(path=copy, language="de", weight=1.0)]
    first = build(replace(data, sources=sources), tmp_path / "cache", 40)
    swapped = build(replace(data, sources=sources[::-1]), tmp_path / "cache", 60, saved=saved(first, 20))
    assert [(source.path, source.key, source.consumed_at_start) for source in swapped.blend.sources] == [
        (copy, 1, 5),
        (str(directory / "german"), 0, 15),
    ]


def test_counting_goes_back_and_forth(directory: Path, tmp_path: Path) -> None:
    samples = build(section(directory, {"english": 3.0, "german": 1.0}), tmp_path / "cache", 60)
    for position in (40, 20, 60, 0, 8):
        assert list(samples.consumed_per_source(position).values()) == [position * 3 // 4, position // 4]

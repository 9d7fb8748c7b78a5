"""Training blend and validation samples, compared with plain reconstructions from the documents."""

import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.messages import user_error
from support.sidecars import save_sidecar
from support.token_datasets import (
    ENGLISH,
    EOD,
    GERMAN,
    LANGUAGES,
    LATIN,
    SEED,
    VOCAB_SIZE,
    build,
    make_documents,
    plain_epoch,
    section,
    source_seed,
    write_dataset,
)

from megatron_prealign.data.samples import TrainPlan, ValidationSamples
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.recipe.data import DataSection, DataSource, ValidationSource


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("datasets")
    write_dataset(directory / "english", ENGLISH, "en")
    write_dataset(directory / "german", GERMAN, "de")
    write_dataset(directory / "latin", LATIN, "la")
    return directory


@pytest.mark.parametrize("seq_length", [2, 16, 200])
def test_tokens_equal_a_plain_reconstruction(directory, tmp_path, seq_length):
    data = section(directory, {"english": 2.0, "german": 1.0}, seq_length)
    num_samples = (sum(len(document) for document in GERMAN) - 1) // seq_length
    samples = build(data, tmp_path, num_samples)
    batch = samples.batch(range(num_samples))
    expected = {
        "en": plain_epoch(ENGLISH, seq_length, source_seed(0)),
        "de": plain_epoch(GERMAN, seq_length, source_seed(1)),
    }
    for position in range(num_samples):
        language = LANGUAGES[int(batch.language[position])]
        np.testing.assert_array_equal(batch.tokens[position].numpy(), expected[language].pop(0))
    assert batch.tokens.dtype == batch.language.dtype == batch.sample_id.dtype == torch.int64
    assert batch.sample_id.tolist() == list(range(num_samples))


def test_first_epoch_equals_megatron(directory, tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size = None
        eod = EOD
        unique_identifiers: dict = {}

    config = GPTDatasetConfig(
        random_seed=source_seed(0),
        sequence_length=16,
        blend_per_split=[(["german"], None), None, None],
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=str(tmp_path / "megatron"),
    )
    dataset = IndexedDataset(str(directory / "german"))
    epoch = (sum(map(len, GERMAN)) - 1) // 16
    reference = GPTDataset(dataset, "german", np.arange(25, dtype=np.int32), epoch, Split.train, config)
    batch = build(section(directory, {"german": 1.0}), tmp_path, 3 * epoch).batch(range(epoch))
    for position in range(epoch):
        expected = reference[position]
        assert torch.equal(batch.tokens[position, :-1], expected["tokens"])
        assert torch.equal(batch.tokens[position, 1:], expected["labels"])


def test_each_epoch_is_shuffled_separately(directory, tmp_path):
    epoch = (sum(map(len, GERMAN)) - 1) // 16
    batch = build(section(directory, {"german": 1.0}), tmp_path, 4 * epoch + 3, lookahead=9).batch(range(4 * epoch + 3))
    seen = []
    for number in range(4):
        seed = source_seed(0) if number == 0 else source_seed(0, number)
        expected = np.stack(plain_epoch(GERMAN, 16, seed, 9))
        np.testing.assert_array_equal(batch.tokens[number * epoch : (number + 1) * epoch].numpy(), expected)
        seen.append(expected.tobytes())
    assert len(set(seen)) == 4
    np.testing.assert_array_equal(batch.tokens[4 * epoch :].numpy(), plain_epoch(GERMAN, 16, source_seed(0, 4), 9)[:3])


@pytest.mark.parametrize("seed", range(4))
def test_a_longer_plan_starts_with_the_shorter_one(directory, tmp_path, seed):
    """Any weights, any two lengths, several epochs: the common samples are the same."""
    random = np.random.default_rng(seed)
    weights = dict(zip(("english", "german", "latin"), random.dirichlet([0.7] * 3).tolist(), strict=True))
    short, long = sorted(random.integers(1, 700, size=2).tolist())
    data = section(directory, weights)
    batch = build(data, tmp_path, long).batch(range(short))
    expected = build(data, tmp_path, short).batch(range(short))
    assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.language, expected.language)


def test_sample_counts_follow_the_weights(directory, tmp_path):
    weights = {"english": 7.0, "german": 2.0, "latin": 1.0}
    samples = build(section(directory, weights), tmp_path, 300)
    paths = {name: str(directory / name) for name in weights}
    for num_samples in range(1, 301):
        consumed = samples.consumed_per_source(num_samples)
        assert sum(consumed.values()) == num_samples
        for name, weight in weights.items():
            # One sample: every position goes to the source with the largest deficit.
            assert abs(consumed[paths[name]] - num_samples * weight / 10) <= 1.0
    languages = samples.batch(range(137)).language
    consumed = samples.consumed_per_source(137)
    assert [consumed[paths[name]] for name in ("german", "english", "latin")] == languages.bincount().tolist()
    assert samples.consumed_per_source(0) == dict.fromkeys(paths.values(), 0)


def test_source_that_is_never_drawn(directory, tmp_path):
    samples = build(section(directory, {"german": 1.0, "english": 9.0}), tmp_path, 1)
    assert samples.consumed_per_source(1) == {str(directory / "german"): 0, str(directory / "english"): 1}
    assert samples.batch([0]).language.tolist() == [1]


def test_samples_do_not_depend_on_access_order_or_cache(directory, tmp_path):
    data = section(directory, {"english": 1.0, "german": 1.0}, validation_fraction=0.1)
    first = build(data, tmp_path / "a", 90)
    tokens = first.batch(range(90)).tokens
    order = np.random.default_rng(0).permutation(90)
    resumed, elsewhere = build(data, tmp_path / "a", 90), build(data, tmp_path / "b", 90)
    for samples in (resumed, elsewhere):
        batch = samples.batch(order)
        assert torch.equal(batch.tokens, tokens[order])
        assert batch.sample_id.tolist() == order.tolist()
    assert len(list((tmp_path / "a").glob("blend-*"))) == 1
    assert not torch.equal(build(data, tmp_path / "a", 90, seed=SEED + 1).batch(range(90)).tokens, tokens)


def test_sources_of_equal_size_are_shuffled_differently(directory, tmp_path):
    # German and Latin have documents of the same lengths, like parallel texts and clones.
    batch = build(section(directory, {"german": 1.0, "latin": 1.0}), tmp_path, 40).batch(range(40))
    german, latin = batch.tokens[batch.language == 0], batch.tokens[batch.language == 2]
    assert not torch.equal(german + 20_000 * (german != EOD), latin)


def test_rebuilt_data_is_not_read_with_an_old_index(directory, tmp_path):
    for count in (60, 50):
        path = write_dataset(tmp_path / "english", ENGLISH[:count], "en")
        data = replace(section(directory, {"english": 1.0}), sources=[DataSource(path=path, language="en")])
        batch = build(data, tmp_path / "cache", 10).batch(range(10))
        expected = plain_epoch(ENGLISH[:count], 16, source_seed(0))[:10]
        np.testing.assert_array_equal(batch.tokens.numpy(), expected)


@pytest.mark.parametrize("damage", ["truncate", "manifest", "leftover"])
def test_incomplete_cache_is_not_used(directory, tmp_path, damage):
    data = section(directory, {"english": 1.0, "german": 1.0})
    expected = build(data, tmp_path).batch(range(40)).tokens
    (cache,) = tmp_path.glob("blend-*")
    if damage == "truncate":
        os.truncate(cache / "samples_1.npy", (cache / "samples_1.npy").stat().st_size // 2)
    elif damage == "manifest":
        (cache / "index.json").unlink()
    else:
        cache.rename(tmp_path / f".{cache.name}.tmp-abcd")
    assert torch.equal(build(data, tmp_path).batch(range(40)).tokens, expected)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == [cache.name]


def scored_labels(samples: ValidationSamples, language: str) -> tuple[list[int], list[int]]:
    """The first input and all unmasked labels, over all samples in order."""
    batch, mask = samples.batch(language, range(samples.num_samples(language)))
    assert mask.dtype == torch.bool and mask.shape == (len(batch.tokens), batch.tokens.shape[1] - 1)
    assert batch.language.tolist() == [LANGUAGES.index(language)] * len(batch.tokens)
    assert bool((batch.tokens[:, 1:][~mask] == EOD).all())
    return batch.tokens[0, :1].tolist(), batch.tokens[:, 1:][mask].tolist()


@pytest.mark.parametrize("fraction, held_out", [(0.07, 5), (0.25, 15), (0.0001, 1)])
def test_held_out_documents_are_scored_once_and_never_trained_on(directory, tmp_path, fraction, held_out):
    data = section(directory, {"english": 1.0, "german": 1.0}, 8, validation_fraction=fraction)
    validation = ValidationSamples.build(data, languages=LANGUAGES, max_samples=10_000)
    assert validation.languages == ["de", "en"]
    first, labels = scored_labels(validation, "en")
    assert first + labels == np.concatenate(ENGLISH[-held_out:]).tolist()
    batch = build(data, tmp_path, 900).batch(range(900))
    trained = set(batch.tokens.unique().tolist()) - {EOD}
    assert trained.isdisjoint(labels)
    # Nothing else is excluded from training.
    assert len(trained) > 0.9 * sum(len(d) - 1 for d in ENGLISH[:-held_out])


def test_held_out_fraction_is_robust_to_floating_point(directory, tmp_path):
    # 0.07 * 100 is 7.000000000000001, but must hold out seven documents.
    documents = make_documents(100, 1, seed=3)
    data = section(directory, {"english": 1.0}, validation_fraction=0.07)
    data = replace(data, sources=[DataSource(path=write_dataset(tmp_path / "hundred", documents, "en"), language="en")])
    first, labels = scored_labels(ValidationSamples.build(data, languages=LANGUAGES, max_samples=999), "en")
    assert first + labels == np.concatenate(documents[-7:]).tolist()


def test_validation_fraction_of_zero_holds_nothing_out(directory):
    validation = ValidationSamples.build(section(directory, {"english": 1.0}), languages=LANGUAGES, max_samples=5)
    assert validation.languages == [] and validation.num_samples("en") == 0
    with pytest.raises(KeyError):
        validation.batch("en", [0])


def test_separate_validation_files_leave_training_data_complete(directory, tmp_path):
    held_out = write_dataset(tmp_path / "held_out", LATIN[:7], "en")
    data = section(
        directory,
        {"english": 1.0},
        validation=[ValidationSource(path=held_out, language="en")],
        validation_fraction=0.5,
    )
    validation = ValidationSamples.build(data, languages=LANGUAGES, max_samples=10_000)
    first, labels = scored_labels(validation, "en")
    assert first + labels == np.concatenate(LATIN[:7]).tolist()
    batch = build(data, tmp_path, 50).batch(range(50))
    np.testing.assert_array_equal(batch.tokens.numpy(), plain_epoch(ENGLISH, 16, source_seed(0))[:50])


def test_sources_of_a_language_are_concatenated_and_capped(directory, tmp_path):
    more = write_dataset(tmp_path / "more", LATIN, "en")
    data = section(directory, {"english": 1.0}, validation_fraction=0.1)
    data = replace(data, sources=[*data.sources, DataSource(path=more, language="en")])
    everything = np.concatenate([*ENGLISH[-6:], *LATIN[-3:]]).tolist()
    complete = ValidationSamples.build(data, languages=LANGUAGES, max_samples=10_000)
    first, labels = scored_labels(complete, "en")
    assert first + labels == everything
    capped = ValidationSamples.build(data, languages=LANGUAGES, max_samples=2)
    first, labels = scored_labels(capped, "en")
    assert capped.num_samples("en") == 2 and first + labels == everything[: 2 * 16 + 1]
    batch, _ = complete.batch("en", [1, 0])
    assert batch.tokens.reshape(-1).tolist() == everything[16:33] + everything[:17]
    assert batch.sample_id.tolist() == [1, 0]


def test_validation_shorter_than_one_sample(directory):
    data = section(directory, {"english": 1.0}, 500, validation_fraction=0.05)
    batch, mask = ValidationSamples.build(data, languages=LANGUAGES, max_samples=10).batch("en", [0])
    text = np.concatenate(ENGLISH[-3:])
    assert batch.tokens[0].tolist() == text.tolist() + [EOD] * (501 - len(text))
    assert mask[0].tolist() == [True] * (len(text) - 1) + [False] * (501 - len(text))


def test_documents_of_several_sequences_are_not_split(directory, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "parts"
    write_dataset(prefix, ENGLISH[:4], "en")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    parts = [np.arange(start, start + 30) for start in range(100, 340, 30)]
    for number in range(0, 8, 2):
        builder.add_document(np.concatenate(parts[number : number + 2]), [30, 30])
    builder.finalize(f"{prefix}.idx")
    save_sidecar(replace(load_sidecar(prefix), documents=4, tokens=240), prefix)
    data = section(directory, {"english": 1.0}, validation_fraction=0.2)
    data = replace(data, sources=[DataSource(path=str(prefix), language="en")])
    first, labels = scored_labels(ValidationSamples.build(data, languages=LANGUAGES, max_samples=99), "en")
    assert first + labels == list(range(280, 340))
    assert int(build(data, tmp_path, 30).batch(range(30)).tokens.max()) < 280


def test_sixteen_bit_ids_above_two_to_the_fifteen(tmp_path):
    document = np.append(np.arange(65_000, 65_050), EOD)
    path = write_dataset(tmp_path / "small", [document], "en", vocab_size=65_050)
    data = DataSection(
        tokenizer="t", sources=[DataSource(path=path, language="en")], seq_length=50, validation_fraction=0
    )
    assert build(data, tmp_path, 1).batch([0]).tokens[0].tolist() == document.tolist()


def test_bad_arguments(directory, tmp_path):
    data = section(directory, {"english": 1.0})
    samples = build(data, tmp_path, 5)
    assert len(samples) == 5 and samples.batch([]).tokens.shape == (0, 17)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"sample {index} .* 5"):
            samples.batch([index])
    with pytest.raises(ValueError, match="num_samples is 6, expected 0 to 5"):
        samples.consumed_per_source(6)
    with pytest.raises(ValueError, match="num_samples is 0"):
        build(data, tmp_path, 0)


def change_sidecar(prefix: Path, **changes) -> None:
    save_sidecar(replace(load_sidecar(prefix), **changes), prefix)


def make_damage(name: str, prefix: Path) -> None:
    tokenizer = load_sidecar(prefix).tokenizer
    if name == "language":
        change_sidecar(prefix, language="fr")
    elif name == "fingerprint":
        change_sidecar(prefix, tokenizer=replace(tokenizer, fingerprint="sha256:bb"))
    elif name == "vocabulary":
        change_sidecar(prefix, tokenizer=replace(tokenizer, vocab_size=VOCAB_SIZE + 1))
    elif name == "other sidecar":
        change_sidecar(prefix, documents=61)
    elif name == "no bin":
        Path(f"{prefix}.bin").unlink()
    elif name == "short bin":
        os.truncate(f"{prefix}.bin", 100)
    else:
        os.truncate(f"{prefix}.idx", 100)


@pytest.mark.parametrize(
    "damage, facts",
    [
        ("language", ("english.json: language is 'fr'", "'en'")),
        ("fingerprint", ("english.json", "tokenizer somewhere (sha256:bb)", "expected sha256:aa", "german.json")),
        ("vocabulary", ("english.json", "90001 ids", "90000")),
        ("other sidecar", ("english.idx: contains 60 documents", "sidecar lists 61")),
        ("no bin", ("english.bin: file not found",)),
        ("short bin", ("english.bin: got 100 bytes",)),
        ("short idx", ("english.idx: got 100 bytes",)),
    ],
)
@pytest.mark.parametrize("where", ["training", "validation"])
def test_corrupt_sources_are_user_errors(tmp_path, damage, facts, where):
    write_dataset(tmp_path / "german", GERMAN, "de")
    write_dataset(tmp_path / "english", ENGLISH, "en")
    make_damage(damage, tmp_path / "english")
    data = section(tmp_path, {"german": 1.0, "english": 1.0}, validation_fraction=0.1)
    with user_error(*facts):
        if where == "training":
            build(data, tmp_path / "cache", vocab_size=VOCAB_SIZE)
        else:
            ValidationSamples.build(data, languages=LANGUAGES, max_samples=4, vocab_size=VOCAB_SIZE)


def test_wrong_combinations_are_user_errors(directory, tmp_path):
    data = section(directory, {"english": 1.0})
    with user_error("english.json", "expected sha256:cc", "the tokenizer tokenizer;"):
        build(data, tmp_path, tokenizer_fingerprint="sha256:cc")
    with user_error(directory / "english", "language 'en'", "languages de, fr"):
        build(data, tmp_path, languages=["de", "fr"])
    tokens = sum(len(document) for document in ENGLISH)
    build(replace(data, seq_length=tokens - 1), tmp_path, 1)
    with user_error(
        f"english: got {tokens} tokens in 60 training documents (0 more", f"data.seq_length + 1 = {tokens + 1};"
    ):
        build(replace(data, seq_length=tokens), tmp_path, 1)
    same = ValidationSource(path=str(directory / ".." / directory.name / "english"), language="en")
    with user_error(f"data.validation: {same.path}", "data.sources"):
        build(replace(data, validation=[same]), tmp_path)


def test_ids_outside_the_vocabulary_are_user_errors(tmp_path):
    document = np.append(np.arange(80, 110), EOD)
    paths = [
        write_dataset(tmp_path / "good", [document % 100], "de", vocab_size=100),
        write_dataset(tmp_path / "bad", [document, document], "en", vocab_size=100),
    ]
    sources = [DataSource(path=path, language=code) for path, code in zip(paths, ("de", "en"), strict=True)]
    data = DataSection(tokenizer="t", sources=sources, seq_length=30, validation_fraction=0.3)
    samples = build(data, tmp_path, 2)
    samples.batch([0])
    with user_error("bad.bin: got token id 100", "0 to 99"):
        samples.batch([0, 1])
    validation = ValidationSamples.build(data, languages=LANGUAGES, max_samples=4)
    with user_error("bad.bin: got token id 100"):
        validation.batch("en", [0])


def test_building_logs_no_warnings(directory, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        build(section(directory, {"english": 1.0, "german": 1.0}), tmp_path)
    assert caplog.records == []


# For each case the cache directories and the builder flags of the two ranks.
LAYOUTS = {
    # Megatron-Core's own cache fails here: its rank 0 builds, and rank 1 reads another disk.
    "two nodes with own disks": (("node0", "node1"), (True, True)),
    "two nodes on a shared disk": (("shared", "shared"), (True, True)),
    # The builder need not be global rank 0.
    "one node": (("node", "node"), (False, True)),
}


def build_on_rank(rank: int, directory: Path, results: Path) -> None:
    """A rank of a two-process gloo job: builds in every layout and saves its samples; runs in a spawned process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{results}/rendezvous", rank=rank, world_size=2)
    data = section(directory, {"english": 1.0, "german": 2.0}, validation_fraction=0.1)
    tokens = {}
    for layout, (caches, builders) in LAYOUTS.items():
        cache_dir = results / caches[rank]
        plan = TrainPlan.read(data, num_samples=70, seed=SEED, languages=LANGUAGES, cache_dir=cache_dir)
        if builders[rank]:
            plan.write_index()
        dist.barrier()
        samples = plan.open()
        tokens[layout] = samples.batch(range(70)).tokens
    torch.save(tokens, results / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(directory, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build_on_rank, args=(rank, directory, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=90)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    data = section(directory, {"english": 1.0, "german": 2.0}, validation_fraction=0.1)
    expected = build(data, tmp_path / "alone", 70).batch(range(70)).tokens
    for rank in range(2):
        tokens = torch.load(tmp_path / f"{rank}.pt")
        for layout, (caches, _) in LAYOUTS.items():
            assert torch.equal(tokens[layout], expected), layout
            assert len(list((tmp_path / caches[rank]).glob("blend-*"))) == 1

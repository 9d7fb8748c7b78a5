"""Tests of the training blend and of the validation windows, against plain reconstructions from the documents."""

import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
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
from megatron_prealign.errors import UserError
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
    rows = samples.rows(range(num_samples))
    expected = {
        "en": plain_epoch(ENGLISH, seq_length, source_seed(0)),
        "de": plain_epoch(GERMAN, seq_length, source_seed(1)),
    }
    for position in range(num_samples):
        language = LANGUAGES[int(rows.language[position])]
        np.testing.assert_array_equal(rows.tokens[position].numpy(), expected[language].pop(0))
    assert rows.tokens.dtype == rows.language.dtype == rows.sample_id.dtype == torch.int64
    assert rows.sample_id.tolist() == list(range(num_samples))


def test_first_epoch_is_megatrons(directory, tmp_path):
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
    theirs = GPTDataset(dataset, "german", np.arange(25, dtype=np.int32), epoch, Split.train, config)
    rows = build(section(directory, {"german": 1.0}), tmp_path, 3 * epoch).rows(range(epoch))
    for position in range(epoch):
        expected = theirs[position]
        assert torch.equal(rows.tokens[position, :-1], expected["tokens"])
        assert torch.equal(rows.tokens[position, 1:], expected["labels"])


def test_each_epoch_is_a_shuffle_of_its_own(directory, tmp_path):
    epoch = (sum(map(len, GERMAN)) - 1) // 16
    rows = build(section(directory, {"german": 1.0}), tmp_path, 4 * epoch + 3, lookahead=9).rows(range(4 * epoch + 3))
    seen = []
    for number in range(4):
        seed = source_seed(0) if number == 0 else source_seed(0, number)
        expected = np.stack(plain_epoch(GERMAN, 16, seed, 9))
        np.testing.assert_array_equal(rows.tokens[number * epoch : (number + 1) * epoch].numpy(), expected)
        seen.append(expected.tobytes())
    assert len(set(seen)) == 4
    np.testing.assert_array_equal(rows.tokens[4 * epoch :].numpy(), plain_epoch(GERMAN, 16, source_seed(0, 4), 9)[:3])


@pytest.mark.parametrize("seed", range(4))
def test_a_longer_plan_begins_with_the_shorter_one(directory, tmp_path, seed):
    """Any weights, any two lengths, several epochs: what was read stays what it was."""
    random = np.random.default_rng(seed)
    weights = dict(zip(("english", "german", "latin"), random.dirichlet([0.7] * 3).tolist(), strict=True))
    short, long = sorted(random.integers(1, 700, size=2).tolist())
    data = section(directory, weights)
    rows = build(data, tmp_path, long).rows(range(short))
    expected = build(data, tmp_path, short).rows(range(short))
    assert torch.equal(rows.tokens, expected.tokens) and torch.equal(rows.language, expected.language)


def test_shares_follow_the_weights(directory, tmp_path):
    weights = {"english": 7.0, "german": 2.0, "latin": 1.0}
    samples = build(section(directory, weights), tmp_path, 300)
    paths = {name: str(directory / name) for name in weights}
    for num_samples in range(1, 301):
        consumed = samples.consumed_per_source(num_samples)
        assert sum(consumed.values()) == num_samples
        for name, weight in weights.items():
            # One sample: the blend gives each position to the source furthest behind its share.
            assert abs(consumed[paths[name]] - num_samples * weight / 10) <= 1.0
    languages = samples.rows(range(137)).language
    consumed = samples.consumed_per_source(137)
    assert [consumed[paths[name]] for name in ("german", "english", "latin")] == languages.bincount().tolist()
    assert samples.consumed_per_source(0) == dict.fromkeys(paths.values(), 0)


def test_source_that_is_never_drawn(directory, tmp_path):
    samples = build(section(directory, {"german": 1.0, "english": 9.0}), tmp_path, 1)
    assert samples.consumed_per_source(1) == {str(directory / "german"): 0, str(directory / "english"): 1}
    assert samples.rows([0]).language.tolist() == [1]


def test_rows_do_not_depend_on_call_order_or_cache(directory, tmp_path):
    data = section(directory, {"english": 1.0, "german": 1.0}, validation_fraction=0.1)
    first = build(data, tmp_path / "a", 90)
    whole = first.rows(range(90)).tokens
    order = np.random.default_rng(0).permutation(90)
    resumed, elsewhere = build(data, tmp_path / "a", 90), build(data, tmp_path / "b", 90)
    for samples in (resumed, elsewhere):
        rows = samples.rows(order)
        assert torch.equal(rows.tokens, whole[order])
        assert rows.sample_id.tolist() == order.tolist()
    assert len(list((tmp_path / "a").glob("blend-*"))) == 1
    assert not torch.equal(build(data, tmp_path / "a", 90, seed=SEED + 1).rows(range(90)).tokens, whole)


def test_sources_of_equal_size_are_shuffled_differently(directory, tmp_path):
    # German and Latin have documents of the same lengths, as parallel texts and clones have.
    rows = build(section(directory, {"german": 1.0, "latin": 1.0}), tmp_path, 40).rows(range(40))
    german, latin = rows.tokens[rows.language == 0], rows.tokens[rows.language == 2]
    assert not torch.equal(german + 20_000 * (german != EOD), latin)


def test_rebuilt_data_is_not_read_with_an_old_index(directory, tmp_path):
    for count in (60, 50):
        path = write_dataset(tmp_path / "english", ENGLISH[:count], "en")
        data = replace(section(directory, {"english": 1.0}), sources=[DataSource(path=path, language="en")])
        rows = build(data, tmp_path / "cache", 10).rows(range(10))
        expected = plain_epoch(ENGLISH[:count], 16, source_seed(0))[:10]
        np.testing.assert_array_equal(rows.tokens.numpy(), expected)


@pytest.mark.parametrize("damage", ["truncate", "manifest", "leftover"])
def test_half_written_cache_is_not_believed(directory, tmp_path, damage):
    data = section(directory, {"english": 1.0, "german": 1.0})
    expected = build(data, tmp_path).rows(range(40)).tokens
    (cache,) = tmp_path.glob("blend-*")
    if damage == "truncate":
        os.truncate(cache / "samples_1.npy", (cache / "samples_1.npy").stat().st_size // 2)
    elif damage == "manifest":
        (cache / "index.json").unlink()
    else:
        cache.rename(tmp_path / f".{cache.name}.tmp-abcd")
    assert torch.equal(build(data, tmp_path).rows(range(40)).tokens, expected)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == [cache.name]


def scored_labels(samples: ValidationSamples, language: str) -> tuple[list[int], list[int]]:
    """The first input and all labels that the masks leave, over all windows in order."""
    rows, mask = samples.rows(language, range(samples.num_samples(language)))
    assert mask.dtype == torch.bool and mask.shape == (len(rows.tokens), rows.tokens.shape[1] - 1)
    assert rows.language.tolist() == [LANGUAGES.index(language)] * len(rows.tokens)
    assert bool((rows.tokens[:, 1:][~mask] == EOD).all())
    return rows.tokens[0, :1].tolist(), rows.tokens[:, 1:][mask].tolist()


@pytest.mark.parametrize("fraction, held_out", [(0.07, 5), (0.25, 15), (0.0001, 1)])
def test_held_out_documents_are_scored_once_and_never_trained_on(directory, tmp_path, fraction, held_out):
    data = section(directory, {"english": 1.0, "german": 1.0}, 8, validation_fraction=fraction)
    validation = ValidationSamples.build(data, languages=LANGUAGES, max_samples=10_000)
    assert validation.languages == ["de", "en"]
    first, labels = scored_labels(validation, "en")
    assert first + labels == np.concatenate(ENGLISH[-held_out:]).tolist()
    rows = build(data, tmp_path, 900).rows(range(900))
    trained = set(rows.tokens.unique().tolist()) - {EOD}
    assert trained.isdisjoint(labels)
    # And nothing else is kept from training.
    assert len(trained) > 0.9 * sum(len(d) - 1 for d in ENGLISH[:-held_out])


def test_held_out_share_does_not_suffer_from_floating_point(directory, tmp_path):
    # 0.07 * 100 is 7.000000000000001, and still means seven documents.
    documents = make_documents(100, 1, seed=3)
    data = section(directory, {"english": 1.0}, validation_fraction=0.07)
    data = replace(data, sources=[DataSource(path=write_dataset(tmp_path / "hundred", documents, "en"), language="en")])
    first, labels = scored_labels(ValidationSamples.build(data, languages=LANGUAGES, max_samples=999), "en")
    assert first + labels == np.concatenate(documents[-7:]).tolist()


def test_validation_fraction_of_zero_holds_nothing_out(directory):
    validation = ValidationSamples.build(section(directory, {"english": 1.0}), languages=LANGUAGES, max_samples=5)
    assert validation.languages == [] and validation.num_samples("en") == 0
    with pytest.raises(KeyError):
        validation.rows("en", [0])


def test_separate_validation_files_leave_training_whole(directory, tmp_path):
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
    rows = build(data, tmp_path, 50).rows(range(50))
    np.testing.assert_array_equal(rows.tokens.numpy(), plain_epoch(ENGLISH, 16, source_seed(0))[:50])


def test_sources_of_one_language_are_joined_and_capped(directory, tmp_path):
    more = write_dataset(tmp_path / "more", LATIN, "en")
    data = section(directory, {"english": 1.0}, validation_fraction=0.1)
    data = replace(data, sources=[*data.sources, DataSource(path=more, language="en")])
    everything = np.concatenate([*ENGLISH[-6:], *LATIN[-3:]]).tolist()
    whole = ValidationSamples.build(data, languages=LANGUAGES, max_samples=10_000)
    first, labels = scored_labels(whole, "en")
    assert first + labels == everything
    capped = ValidationSamples.build(data, languages=LANGUAGES, max_samples=2)
    first, labels = scored_labels(capped, "en")
    assert capped.num_samples("en") == 2 and first + labels == everything[: 2 * 16 + 1]
    rows, _ = whole.rows("en", [1, 0])
    assert rows.tokens.reshape(-1).tolist() == everything[16:33] + everything[:17] and rows.sample_id.tolist() == [1, 0]


def test_validation_shorter_than_one_window(directory):
    data = section(directory, {"english": 1.0}, 500, validation_fraction=0.05)
    rows, mask = ValidationSamples.build(data, languages=LANGUAGES, max_samples=10).rows("en", [0])
    text = np.concatenate(ENGLISH[-3:])
    assert rows.tokens[0].tolist() == text.tolist() + [EOD] * (501 - len(text))
    assert mask[0].tolist() == [True] * (len(text) - 1) + [False] * (501 - len(text))


def test_documents_of_several_sequences_are_not_divided(directory, tmp_path):
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
    assert int(build(data, tmp_path, 30).rows(range(30)).tokens.max()) < 280


def test_sixteen_bit_ids_above_two_to_the_fifteen(tmp_path):
    document = np.append(np.arange(65_000, 65_050), EOD)
    path = write_dataset(tmp_path / "small", [document], "en", vocab_size=65_050)
    data = DataSection(
        tokenizer="t", sources=[DataSource(path=path, language="en")], seq_length=50, validation_fraction=0
    )
    assert build(data, tmp_path, 1).rows([0]).tokens[0].tolist() == document.tolist()


def test_bad_arguments(directory, tmp_path):
    data = section(directory, {"english": 1.0})
    samples = build(data, tmp_path, 5)
    assert len(samples) == 5 and samples.rows([]).tokens.shape == (0, 17)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"sample {index} does not exist, there are 5"):
            samples.rows([index])
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
    "damage, message",
    [
        ("language", r"english\.json: language is 'fr', the recipe says 'en'"),
        (
            "fingerprint",
            r"english\.json: made with tokenizer somewhere \(sha256:bb\), expected sha256:aa as in .*german",
        ),
        ("vocabulary", r"english\.json: its tokenizer has 90001 ids, the model has 90000"),
        ("other sidecar", r"english\.idx: holds 60 documents and \d+ tokens, its sidecar says 61"),
        ("no bin", r"english\.bin: no such file"),
        ("short bin", r"english\.bin: 100 bytes"),
        ("short idx", r"english\.idx: 100 bytes"),
    ],
)
@pytest.mark.parametrize("where", ["training", "validation"])
def test_damaged_sources_are_user_errors(tmp_path, damage, message, where):
    write_dataset(tmp_path / "german", GERMAN, "de")
    write_dataset(tmp_path / "english", ENGLISH, "en")
    make_damage(damage, tmp_path / "english")
    data = section(tmp_path, {"german": 1.0, "english": 1.0}, validation_fraction=0.1)
    with pytest.raises(UserError, match=message):
        if where == "training":
            build(data, tmp_path / "cache", vocab_size=VOCAB_SIZE)
        else:
            ValidationSamples.build(data, languages=LANGUAGES, max_samples=4, vocab_size=VOCAB_SIZE)


def test_wrong_combinations_are_user_errors(directory, tmp_path):
    data = section(directory, {"english": 1.0})
    with pytest.raises(UserError, match=r"expected sha256:cc as in the tokenizer tokenizer;"):
        build(data, tmp_path, tokenizer_fingerprint="sha256:cc")
    with pytest.raises(UserError, match=r"language 'en' is not among the run's languages de, fr"):
        build(data, tmp_path, languages=["de", "fr"])
    tokens = sum(len(document) for document in ENGLISH)
    build(replace(data, seq_length=tokens - 1), tmp_path, 1)
    with pytest.raises(
        UserError, match=rf"english: {tokens} tokens in 60 training documents \(0 more .* = {tokens + 1};"
    ):
        build(replace(data, seq_length=tokens), tmp_path, 1)
    same = ValidationSource(path=str(directory / ".." / directory.name / "english"), language="en")
    with pytest.raises(UserError, match=r"data\.validation: .*english is also in data\.sources"):
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
    samples.rows([0])
    with pytest.raises(UserError, match=r"bad\.bin: holds token id 100, expected ids from 0 to 99"):
        samples.rows([0, 1])
    validation = ValidationSamples.build(data, languages=LANGUAGES, max_samples=4)
    with pytest.raises(UserError, match=r"bad\.bin: holds token id 100"):
        validation.rows("en", [0])


def test_building_warns_of_nothing(directory, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        build(section(directory, {"english": 1.0, "german": 1.0}), tmp_path)
    assert caplog.records == []


# For each case the cache directories and the builder flags of the two ranks.
LAYOUTS = {
    # The case that Megatron-Core's own cache fails: its rank 0 builds, and rank 1 looks on another disk.
    "two nodes with own disks": (("node0", "node1"), (True, True)),
    "two nodes on a shared disk": (("shared", "shared"), (True, True)),
    # The builder need not be global rank 0.
    "one node": (("node", "node"), (False, True)),
}


def build_on_rank(rank: int, directory: Path, results: Path) -> None:
    """One process of a job of two: joins gloo, builds in every layout, saves its rows; runs in a spawned process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{results}/rendezvous", rank=rank, world_size=2)
    data = section(directory, {"english": 1.0, "german": 2.0}, validation_fraction=0.1)
    rows = {}
    for layout, (caches, builders) in LAYOUTS.items():
        cache_dir = results / caches[rank]
        plan = TrainPlan.read(data, num_samples=70, seed=SEED, languages=LANGUAGES, cache_dir=cache_dir)
        if builders[rank]:
            plan.write_index()
        dist.barrier()
        samples = plan.open()
        rows[layout] = samples.rows(range(70)).tokens
    torch.save(rows, results / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


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
    expected = build(data, tmp_path / "alone", 70).rows(range(70)).tokens
    for rank in range(2):
        rows = torch.load(tmp_path / f"{rank}.pt")
        for layout, (caches, _) in LAYOUTS.items():
            assert torch.equal(rows[layout], expected), layout
            assert len(list((tmp_path / caches[rank]).glob("blend-*"))) == 1

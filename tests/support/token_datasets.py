"""Small datasets with unique token ids, and a plain reconstruction of their training blend."""

from pathlib import Path

import numpy as np

from megatron_prealign.data.samples import TrainPlan, TrainSamples
from megatron_prealign.data.sidecar import Sidecar, TokenizerRecord
from megatron_prealign.recipe.data import DataSection, DataSource
from support.sidecars import save_sidecar

EOD = 0
SEED = 1234
VOCAB_SIZE = 90_000
Documents = list[np.ndarray]


def make_documents(count: int, first_id: int, seed: int) -> Documents:
    """Documents with unique ids first_id, first_id + 1, ..., each terminated by `EOD`."""
    lengths = np.random.default_rng(seed).integers(0, 40, size=count)
    starts = first_id + np.concatenate([[0], np.cumsum(lengths)])
    return [np.append(np.arange(start, start + length), EOD) for start, length in zip(starts, lengths, strict=False)]


def write_dataset(
    prefix: Path, documents: Documents, language: str, vocab_size: int = VOCAB_SIZE, fingerprint: str = "sha256:aa"
) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16 if vocab_size < 65_500 else np.int32)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    tokens = sum(len(document) for document in documents)
    tokenizer = TokenizerRecord(path="somewhere", fingerprint=fingerprint, vocab_size=vocab_size)
    save_sidecar(
        Sidecar(
            language=language,
            tokenizer=tokenizer,
            eod_id=EOD,
            documents=len(documents),
            tokens=tokens,
            bytes=4 * tokens,
        ),
        prefix,
    )
    return str(prefix)


ENGLISH = make_documents(60, 1, seed=1)
GERMAN = make_documents(25, 20_000, seed=2)
LATIN = make_documents(25, 40_000, seed=2)
LANGUAGES = ["de", "en", "la"]


def section(directory: Path, weights: dict[str, float], seq_length: int = 16, **options) -> DataSection:
    codes = {"english": "en", "german": "de", "latin": "la"}
    return DataSection(
        tokenizer="tokenizer",
        sources=[DataSource(path=str(directory / name), language=codes[name], weight=w) for name, w in weights.items()],
        seq_length=seq_length,
        **{"validation_fraction": 0.0} | options,
    )


def build(data: DataSection, cache_dir: Path, num_samples: int = 40, **options) -> TrainSamples:
    return open_samples(
        data, **{"num_samples": num_samples, "seed": SEED, "languages": LANGUAGES, "cache_dir": cache_dir} | options
    )


def open_samples(data: DataSection, **options) -> TrainSamples:
    """Reads a plan, writes its index and opens it, like the ranks of a job in sequence."""
    plan = TrainPlan.read(data, **options)
    plan.write_index()
    return plan.open()


def source_seed(number: int, *epoch: int) -> int:
    """Seed of the first epoch of a source, or of a later one."""
    return int(np.random.SeedSequence([SEED, number, *epoch]).generate_state(1)[0])


def plain_epoch(documents: Documents, seq_length: int, seed: int, lookahead: int = 0) -> list[np.ndarray]:
    """Plain implementation of an epoch: shuffle documents, concatenate them, cut samples that overlap by one token,
    shuffle the samples.

    With `lookahead`, every sample has this many more tokens of the concatenated documents, which wrap around.
    """
    random = np.random.RandomState(seed)
    order = np.arange(len(documents), dtype=np.int32)
    random.shuffle(order)
    stream = np.concatenate([documents[number] for number in order])
    wrapped = np.concatenate([stream, stream])
    starts = range(0, len(stream) - seq_length, seq_length)
    samples = [wrapped[start : start + seq_length + 1 + lookahead] for start in starts]
    order = np.arange(len(samples), dtype=np.uint32)
    random.shuffle(order)
    return [samples[number] for number in order]

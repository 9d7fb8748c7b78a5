"""Megatron-Core's blending and sample indices, computed in memory without its cache and on any rank."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

# The blend index stores source numbers in 16 bits, and Megatron-Core reserves the last value.
MAX_BLEND_SOURCES = 32766
# Megatron-Core stores sequence numbers in 32 bits without a check.
MAX_SEQUENCES = 2**31 - 1


class SampleIndices(NamedTuple):
    """Positions of the samples of one epoch of one source.

    Sample s of the shuffled order is number n = `shuffle[s]` of the token stream that the sequences
    `documents[0], documents[1], ...` form; it starts at token `samples[n, 1]` of sequence `documents[samples[n, 0]]`
    and has seq_length + 1 tokens, the last of which is the first of sample n + 1.
    """

    documents: np.ndarray
    """int32 [sequences]."""
    samples: np.ndarray
    """int32 or int64 [number of samples + 1, 2]."""
    shuffle: np.ndarray
    """uint32 or int64 [number of samples]."""


def megatron_core_version() -> str:
    """Version of Megatron-Core, which identifies the algorithms below; saved with their results."""
    from megatron.core import __version__

    return str(__version__)


def blending_indices(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, per sample of the blend, its source (int16 [num_samples]) and the sample number within that source
    (int64 [num_samples]).

    The order is greedy: each sample is taken from the source that is furthest behind its weight. After any n samples
    the counts of two sources are within one sample of their weights; with more sources, deviations of up to 1.8 samples
    were measured (Dirichlet weights, 3 to 50 sources). There is no randomness: a shorter blend is a prefix of a longer
    one.
    """
    from megatron.core.datasets import helpers
    from megatron.core.datasets.utils import normalize

    source_of = np.zeros(num_samples, dtype=np.int16)
    sample_of = np.zeros(num_samples, dtype=np.int64)
    helpers.build_blending_indices(source_of, sample_of, normalize(list(weights)), len(weights), num_samples, False)
    return source_of, sample_of


def epoch_indices(dataset: "IndexedDataset", *, sequences: int, seq_length: int, seed: int) -> SampleIndices:
    """Returns one epoch of the first `sequences` sequences: documents shuffled, cut into samples, samples shuffled.

    Gives the same result on every process, with or without `torch.distributed`.

    Args:
        dataset: The source; its sequences have more than `seq_length` tokens in total.
        sequences: Number of sequences to use, from the first.
        seq_length: Tokens per sample, without the extra one for the last label.
        seed: From 0 to 2^32 - 1.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[([dataset.path_prefix], None), None, None],
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        # None would select a directory next to the data; empty disables the cache, and every rank builds the index
        # itself (with a cache only global rank 0 would, and other nodes would look for its files on their own disks).
        path_to_cache="",
    )
    with _without_cache_warning():
        built = GPTDataset(
            dataset,
            dataset.path_prefix,
            np.arange(sequences, dtype=np.int32),
            # Any number up to the size of an epoch gives the complete epoch.
            1,
            Split.train,
            config,
        )
    return SampleIndices(built.document_index, built.sample_index, built.shuffle_index)


@dataclass(frozen=True)
class _NoTokenizer:
    """Tokenizer stub for `GPTDatasetConfig`; building indices uses only these attributes."""

    vocab_size: int | None = None

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {}


@contextmanager
def _without_cache_warning() -> Iterator[None]:
    """Suppresses the warning about a missing cache directory, which is intended here."""

    def keep(record: logging.LogRecord) -> bool:
        return "path_to_cache is None" not in record.getMessage()

    logger = logging.getLogger("megatron.core.datasets.gpt_dataset")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)

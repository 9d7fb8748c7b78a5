"""Megatron-Core's own blending and sample indices, computed in memory without its cache or its rank-0 rule."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

# Blend positions hold the source in 16 bits, and Megatron-Core reserves the last value.
MAX_BLEND_SOURCES = 32766
# Megatron-Core keeps sequence numbers in 32 bits without a check.
MAX_SEQUENCES = 2**31 - 1


class SampleIndices(NamedTuple):
    """Where the samples of one epoch of one source lie.

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
    """Version of the algorithms below, to keep beside what they made."""
    from megatron.core import __version__

    return str(__version__)


def blending_indices(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """For each position of the blend its source (int16 [num_samples]) and that source's sample (int64 [num_samples]).

    The order is greedy: each position goes to the source that is furthest behind its share. After any n positions two
    sources are within one sample of their shares; with more sources up to 1.8 samples were measured (dirichlet
    weights, 3 to 50 sources). It has no randomness: a shorter blend is a prefix of a longer one.
    """
    from megatron.core.datasets import helpers
    from megatron.core.datasets.utils import normalize

    source_of = np.zeros(num_samples, dtype=np.int16)
    sample_of = np.zeros(num_samples, dtype=np.int64)
    helpers.build_blending_indices(source_of, sample_of, normalize(list(weights)), len(weights), num_samples, False)
    return source_of, sample_of


def epoch_indices(dataset: "IndexedDataset", *, sequences: int, seq_length: int, seed: int) -> SampleIndices:
    """One epoch of the first `sequences` sequences: their documents shuffled, cut into samples, the samples shuffled.

    Works the same on every process and with or without `torch.distributed`.

    Args:
        dataset: The source; its sequences hold more than `seq_length` tokens.
        sequences: How many sequences, from the first, may be used.
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
        # None would mean a directory beside the data; empty means no cache, and then every rank computes for itself
        # (with a cache, only global rank 0 would, and the other nodes would look for its files on their own disks).
        path_to_cache="",
    )
    with _without_cache_warning():
        built = GPTDataset(
            dataset,
            dataset.path_prefix,
            np.arange(sequences, dtype=np.int32),
            # Any number up to an epoch's gives the whole epoch.
            1,
            Split.train,
            config,
        )
    return SampleIndices(built.document_index, built.sample_index, built.shuffle_index)


@dataclass(frozen=True)
class _NoTokenizer:
    """`GPTDatasetConfig` wants a tokenizer; building indices asks it for nothing but these."""

    vocab_size: int | None = None

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {}


@contextmanager
def _without_cache_warning() -> Iterator[None]:
    """Drops the one warning that says there is no cache directory, which is on purpose here."""

    def keep(record: logging.LogRecord) -> bool:
        return "path_to_cache is None" not in record.getMessage()

    logger = logging.getLogger("megatron.core.datasets.gpt_dataset")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)

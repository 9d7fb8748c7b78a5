"""Word and sentence retrieval: how well words or sentences find their translations, at every layer of a model."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_prealign.alignment.layout import WordLayout, collect_states
from megatron_prealign.evaluation.retrieval_metrics import METRICS, WordLinks, measure_words
from megatron_prealign.evaluation.word_pairs import WordPairs
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import gather_parameters
from megatron_prealign.runtime.transfer import to_device

# Per data-parallel rank. The number of tokens, padding included, limits microbatches of sentences; words have at most
# eight tokens. For 526 sentences of 58 tokens on average, 2,048 took 1.5 times as much CPU time.
_WORDS_PER_MICROBATCH, _TOKENS_PER_MICROBATCH = 256, 8192

# Direction such as "en-de" -> one of `METRICS` -> one value per layer.
Retrieval = dict[str, dict[str, list[float]]]


def measure_retrieval(
    runtime: Runtime, chunks: Sequence[torch.nn.Module], pairs: Sequence[WordPairs], *, num_layers: int
) -> Retrieval:
    """Computes `measure_words` for every language pair, in both directions, at every layer. A direction that is that of
    one pair and the reverse of another is measured on the former.

    The layers are the embedding output, every block (the last one after the final norm) and the output embedding. The
    ranks of a pipeline stage divide its layers and pairs among themselves; each value is computed by one rank, so all
    ranks get bit-identical results. The host synchronises with the device once, for the result. Collective: call on all
    ranks.
    """
    if not pairs:
        return {}
    words, indices = _distinct_words(pairs)
    links = [WordLinks(pair.links, runtime.device) for pair in pairs]
    device_indices = [[to_device(torch.from_numpy(each), runtime.device) for each in both] for both in indices]
    # The taps read the output embedding before a forward pass could gather its updated parameters.
    gather_parameters(chunks)
    layers, order = _representations(runtime, chunks, words, num_layers)
    result = torch.zeros(len(pairs), num_layers + 2, 2, len(METRICS), dtype=torch.float64, device=runtime.device)
    stage = runtime.groups.tp_dp_cp
    for layer in sorted(layers):
        states = _gather(runtime, layers.pop(layer), order)
        for number, (source, target) in enumerate(device_indices):
            if (layer * len(pairs) + number) % stage.size() == stage.rank():
                result[number, layer] = measure_words(states[source], states[target], links[number])
    dist.all_reduce(result)
    # [pairs, 2, metrics, layers]
    values = result.permute(0, 2, 3, 1).tolist()
    places = {
        direction: (number, way) for number, pair in enumerate(pairs) for way, direction in enumerate(pair.directions)
    }
    # The reverse of another entry's pairs may be other sentences.
    places |= {pair.name: (number, 0) for number, pair in enumerate(pairs)}
    return {
        direction: {
            metric: [round(value, 6) for value in by_layer]
            for metric, by_layer in zip(METRICS, values[number][way], strict=True)
        }
        for direction, (number, way) in places.items()
    }


def _distinct_words(pairs: Sequence[WordPairs]) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """Returns the distinct words of all pairs, and the indices of each pair's sources and targets into them."""
    indices: dict[bytes, int] = {}
    words: list[np.ndarray] = []

    def index_of(word: np.ndarray) -> int:
        index = indices.setdefault(word.tobytes(), len(indices))
        if index == len(words):
            words.append(word)
        return index

    pair_indices = [
        (np.array([*map(index_of, pair.source)]), np.array([*map(index_of, pair.target)])) for pair in pairs
    ]
    return words, pair_indices


def _representations(
    runtime: Runtime, chunks: Sequence[torch.nn.Module], words: Sequence[np.ndarray], num_layers: int
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Computes the mean subword states of this rank's part of `words` at every layer of its stage.

    Returns:
        layer -> float32 `[part, hidden]`, and the index of each word in the concatenated parts of the stage's ranks.
    """
    layout = WordLayout.of(runtime, chunks)
    most = min(_WORDS_PER_MICROBATCH, max(1, _TOKENS_PER_MICROBATCH // max(map(len, words))))
    # Words per microbatch over all data-parallel ranks.
    microbatch_words = min(most, -(-len(words) // runtime.data_size)) * runtime.data_size
    microbatches = -(-len(words) // microbatch_words)
    ranks = runtime.groups.tp_dp_cp.size()
    slots = -(-len(words) // (ranks * microbatches)) * ranks * microbatches
    lengths = np.zeros(slots, dtype=np.int64)
    lengths[: len(words)] = [len(word) for word in words]
    tokens = np.zeros((slots, lengths.max()), dtype=np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(words)
    # Disable dropout, so that the states are deterministic.
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    states = collect_states(
        runtime, chunks, layout, layout.batches(tokens, lengths, microbatches), num_layers=num_layers
    )
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)
    order = np.argsort(layout.by_rank(np.arange(slots), microbatches))[: len(words)]
    return states, to_device(torch.from_numpy(order), runtime.device)


def _gather(runtime: Runtime, local: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """All-gathers the words of the stage's ranks and restores their order."""
    group = runtime.groups.tp_dp_cp
    gathered = local.new_empty((group.size() * local.shape[0], local.shape[1]))
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered[order]

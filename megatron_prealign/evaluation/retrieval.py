"""Word retrieval: how well the words of a model find their translations, layer by layer."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_prealign.alignment.layout import WordLayout, collect_states
from megatron_prealign.evaluation.measures import MEASURES, WordLinks, measure_words
from megatron_prealign.evaluation.word_pairs import WordPairs
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import gather_parameters
from megatron_prealign.runtime.transfer import to_device

_WORDS_PER_MICROBATCH = 256

# Direction such as "en-de" -> one of `MEASURES` -> one value a layer.
Retrieval = dict[str, dict[str, list[float]]]


def measure_retrieval(
    runtime: Runtime, chunks: Sequence[torch.nn.Module], pairs: Sequence[WordPairs], *, num_layers: int
) -> Retrieval:
    """`measures.measure_words` of every language pair, there and back, at every layer.

    The layers are the embedding output, every block (the last after the final norm) and the output embedding. The
    ranks of a pipeline stage share its layers out, and each number comes from one rank: all ranks get the same result
    to the last bit. The host waits for the device once, for the result. Takes part: all ranks.
    """
    if not pairs:
        return {}
    words, places = _distinct_words(pairs)
    links = [WordLinks(pair.links, runtime.device) for pair in pairs]
    places_there = [[to_device(torch.from_numpy(place), runtime.device) for place in both] for both in places]
    # The taps read the output embedding before any forward pass of it could fetch its update.
    gather_parameters(chunks)
    layers, gathered = _representations(runtime, chunks, words, num_layers)
    result = torch.zeros(len(pairs), num_layers + 2, 2, len(MEASURES), dtype=torch.float64, device=runtime.device)
    stage = runtime.groups.tp_dp_cp
    for layer in sorted(layers):
        states = _gather(runtime, layers.pop(layer), gathered)
        for number, (source, target) in enumerate(places_there):
            if (layer * len(pairs) + number) % stage.size() == stage.rank():
                result[number, layer] = measure_words(states[source], states[target], links[number])
    dist.all_reduce(result)
    # [pairs, 2, measures, layers]
    values = result.permute(0, 2, 3, 1).tolist()
    return {
        direction: {
            measure: [round(value, 6) for value in by_layer]
            for measure, by_layer in zip(MEASURES, values[number][way], strict=True)
        }
        for number, pair in enumerate(pairs)
        for way, direction in enumerate(pair.directions)
    }


def _distinct_words(pairs: Sequence[WordPairs]) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """The words of all pairs, each once, and where the sources and the targets of each pair are among them."""
    numbers: dict[bytes, int] = {}
    words: list[np.ndarray] = []

    def place(word: np.ndarray) -> int:
        number = numbers.setdefault(word.tobytes(), len(numbers))
        if number == len(words):
            words.append(word)
        return number

    places = [(np.array([*map(place, pair.source)]), np.array([*map(place, pair.target)])) for pair in pairs]
    return words, places


def _representations(
    runtime: Runtime, chunks: Sequence[torch.nn.Module], words: Sequence[np.ndarray], num_layers: int
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Mean subword state of this rank's share of `words` at every layer of this stage, layer -> float32 `[share,
    hidden]`, and where each word is when the shares of the stage's ranks are put together."""
    layout = WordLayout.of(runtime, chunks)
    # Words of a microbatch on all data-parallel ranks.
    at_once = min(_WORDS_PER_MICROBATCH, -(-len(words) // runtime.data_size)) * runtime.data_size
    microbatches = -(-len(words) // at_once)
    ranks = runtime.groups.tp_dp_cp.size()
    slots = -(-len(words) // (ranks * microbatches)) * ranks * microbatches
    lengths = np.zeros(slots, dtype=np.int64)
    lengths[: len(words)] = [len(word) for word in words]
    tokens = np.zeros((slots, lengths.max()), dtype=np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(words)
    # A word's states must not depend on dropout.
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    states = collect_states(
        runtime, chunks, layout, layout.batches(tokens, lengths, microbatches), num_layers=num_layers
    )
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)
    gathered = np.argsort(layout.by_rank(np.arange(slots), microbatches))[: len(words)]
    return states, to_device(torch.from_numpy(gathered), runtime.device)


def _gather(runtime: Runtime, own: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The words of all ranks of the stage, in order."""
    group = runtime.groups.tp_dp_cp
    every = own.new_empty((group.size() * own.shape[0], own.shape[1]))
    dist.all_gather_into_tensor(every, own.contiguous(), group=group)
    return every[places]

"""Word retrieval: how well the words of a model find their translations, layer by layer."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_prealign.alignment.objective import WordGroups
from megatron_prealign.alignment.taps import LayerTaps, no_loss
from megatron_prealign.alignment.words import WordBatch, pad_words
from megatron_prealign.evaluation.measures import MEASURES, WordLinks, measure_words
from megatron_prealign.evaluation.word_pairs import WordPairs
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction, gather_parameters, run_schedule, unwrap
from megatron_prealign.training.rows import RowMicrobatch, idle_rows, row_loss_sum

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
    places_there = [[torch.from_numpy(place).to(runtime.device) for place in both] for both in places]
    # The taps read the output embedding before any forward pass of it could fetch its update.
    gather_parameters(chunks)
    layers = _representations(runtime, chunks, words, num_layers)
    result = torch.zeros(len(pairs), num_layers + 2, 2, len(MEASURES), dtype=torch.float64, device=runtime.device)
    stage = runtime.groups.tp_dp_cp
    for layer in sorted(layers):
        states = _gather(runtime, layers.pop(layer))
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


def _gather(runtime: Runtime, own: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(own) for _ in range(runtime.data_size)]
    dist.all_gather(parts, own.contiguous(), group=runtime.groups.dp)
    return torch.cat(parts)


def _representations(
    runtime: Runtime, chunks: Sequence[torch.nn.Module], words: Sequence[np.ndarray], num_layers: int
) -> dict[int, torch.Tensor]:
    """Mean subword state of this rank's share of `words` at every layer of this stage: layer -> float32 `[share,
    hidden]`."""
    collected: dict[int, list[torch.Tensor]] = {}

    def collect(layer: int, states: torch.Tensor, batch: WordBatch) -> None:
        collected.setdefault(layer, []).append(states.detach())

    models = [unwrap(chunk) for chunk in chunks]
    taps = LayerTaps(models, runtime, num_layers)

    def forward_step(
        microbatches: Iterator[WordBatch | RowMicrobatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        batch = next(microbatches)
        if isinstance(batch, RowMicrobatch):
            output, loss_of = row_loss_sum(chunk, batch)
            return output, lambda losses: (loss_of(losses), {})
        return taps.run_words(chunk, unwrap(chunk), batch), lambda hidden: (no_loss(hidden), {})

    batches: list[WordBatch | RowMicrobatch] = [*_word_batches(runtime, words)]
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), taps.observing(collect):
        run_schedule(
            runtime,
            chunks,
            forward_step,
            batches,
            idle=lambda: idle_rows(runtime),
            shape=(batches[0].tokens.shape[1], batches[0].tokens.shape[0]),
            mixed_shapes=True,
            forward_only=True,
        )
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)
    return {layer: torch.cat(states) for layer, states in collected.items()}


def _word_batches(runtime: Runtime, words: Sequence[np.ndarray]) -> list[WordBatch]:
    """This rank's contiguous share of the words, the last share filled up with empty words."""
    multiple = runtime.parallel.tensor_model_parallel_size if runtime.parallel.sequence_parallel else 1
    width = -(-max(len(word) for word in words) // multiple) * multiple
    share = -(-len(words) // runtime.data_size)
    tokens, pooling = pad_words(words, width)
    filling = share * runtime.data_size - len(words)
    tokens, pooling = (np.pad(array, ((0, filling), (0, 0))) for array in (tokens, pooling))
    own = slice(runtime.data_rank * share, (runtime.data_rank + 1) * share)
    no_groups = torch.zeros(0, dtype=torch.int64)
    batches = []
    for part_tokens, part_pooling in zip(
        torch.from_numpy(tokens[own]).split(_WORDS_PER_MICROBATCH),
        torch.from_numpy(pooling[own]).split(_WORDS_PER_MICROBATCH),
        strict=True,
    ):
        positions = torch.arange(width, device=runtime.device).expand(len(part_tokens), width).contiguous()
        batches.append(
            WordBatch(
                tokens=part_tokens.to(runtime.device),
                position_ids=positions,
                # A copy: batches are told apart by where their pooling weights lie.
                pooling=part_pooling.to(runtime.device, copy=True),
                groups=WordGroups(every=no_groups, own=no_groups, pairs=torch.zeros(())),
                global_tokens=0,
            )
        )
    return batches

"""Word retrieval: is the translation of a word its nearest neighbour, layer by layer?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_prealign.alignment.objective import WordGroups
from megatron_prealign.alignment.taps import LayerTaps, no_loss
from megatron_prealign.alignment.words import WordBatch, pad_words
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction, run_schedule, unwrap
from megatron_prealign.training.rows import RowMicrobatch, idle_rows, row_loss_sum

_WORDS_PER_MICROBATCH = 256


@dataclass(frozen=True, eq=False)
class WordPairs:
    """Words of one language pair: `source[i]` means `target[i]`.

    Attributes:
        target_id: the same number for targets of the same tokens: two words may share a translation, and both find it.
    """

    name: str
    source: list[np.ndarray]
    target: list[np.ndarray]
    target_id: np.ndarray


def word_pairs(table: DictionaryTable, groups: np.ndarray, *, limit: int, max_word_tokens: int) -> list[WordPairs]:
    """Pairs of a group's source word and its first translation in each language.

    Args:
        groups: bool `[groups]`, the groups to take from.
        limit: pairs per language pair; the most frequent in the counting corpus, then the first in the table.
    """
    order = np.argsort(-table.group_count, kind="stable")
    chosen: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for group in order[groups[order]]:
        members = range(table.group_offsets[group], table.group_offsets[group + 1])
        words = [
            (int(table.word_language[w]), table.word_tokens[table.word_offsets[w] : table.word_offsets[w + 1]])
            for w in members
        ]
        words = [(language, tokens) for language, tokens in words if 0 < len(tokens) <= max_word_tokens]
        if not words or words[0][0] != table.word_language[members[0]]:
            continue
        source_language, source = words[0]
        seen: set[int] = {source_language}
        for language, tokens in words[1:]:
            if language in seen:
                continue
            seen.add(language)
            pairs = chosen.setdefault((source_language, language), [])
            if len(pairs) < limit:
                pairs.append((source, tokens))
    return [_named_pairs(table, languages, pairs) for languages, pairs in sorted(chosen.items())]


def _named_pairs(
    table: DictionaryTable, languages: tuple[int, int], pairs: list[tuple[np.ndarray, np.ndarray]]
) -> WordPairs:
    numbers: dict[tuple[int, ...], int] = {}
    target_id = np.array([numbers.setdefault(tuple(target.tolist()), len(numbers)) for _, target in pairs])
    return WordPairs(
        name="-".join(table.languages[language] for language in languages),
        source=[source for source, _ in pairs],
        target=[target for _, target in pairs],
        target_id=target_id,
    )


def retrieval_p_at_1(
    runtime: Runtime, chunks: Sequence[torch.nn.Module], pairs: Sequence[WordPairs], *, num_layers: int
) -> dict[str, list[float]]:
    """Share of source words whose nearest target by cosine is their translation, per language pair and layer.

    The layers are the embedding output, every block (the last after the final norm) and the output embedding. Takes
    part: all ranks.
    """
    words = [word for pair in pairs for word in (*pair.source, *pair.target)]
    if not words:
        return {}
    layers = _representations(runtime, chunks, words, num_layers)
    scores = torch.zeros(len(pairs), num_layers + 2, dtype=torch.float64, device=runtime.device)
    for layer in sorted(layers):
        states = _gather(runtime, layers[layer])[: len(words)]
        start = 0
        for row, pair in enumerate(pairs):
            count = len(pair.source)
            source, target = states[start : start + count], states[start + count : start + 2 * count]
            start += 2 * count
            target_id = torch.from_numpy(pair.target_id).to(runtime.device)
            nearest = (F.normalize(source, dim=-1) @ F.normalize(target, dim=-1).t()).argmax(dim=1)
            scores[row, layer] = (target_id[nearest] == target_id).double().mean()
    dist.all_reduce(scores, group=runtime.groups.pp)
    return {pair.name: [round(value, 6) for value in row] for pair, row in zip(pairs, scores.tolist(), strict=True)}


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

"""Code-switching of a batch in plain torch: the definition that every faster kernel must match bit by bit.

Known words of the input are replaced by translations, the labels stay in the original language. All decisions are
integer arithmetic on (seed, sample id, position, tokens of the word), so the result for a sequence is the same on any
device, in any batch and after any resume.

This is also the CPU implementation and optimised for that: the few switched words are gathered from the batch and
processed as lists. On a GPU this waits for the device several times per call; the Triton kernel does not.

Shapes: B sequences of W source tokens, S positions of the result, N words.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prealign.kernels.code_switch_interface import (
    LANGUAGES_FROM,
    CodeSwitchBatch,
    CodeSwitchOutput,
    CodeSwitchSettings,
    check_inputs,
)
from megatron_prealign.kernels.ngram_table import (
    BOUNDARY_AFTER,
    BOUNDARY_BEFORE,
    HAS_LETTER,
    LENGTH_SHIFT,
    MAX_CANDIDATE_TOKENS,
    TARGET_SHIFT,
    TOKEN_BITS,
    WORD,
    NgramTable,
    draw,
    lookup,
    pack_first,
)
from megatron_prealign.kernels.philox import philox_4x32_10


class _Words(NamedTuple):
    """Words gathered from the batch, in the order of the batch (all int64 [N])."""

    row: Tensor
    position: Tensor
    """Position of the first token."""
    length: Tensor
    """Number of tokens of the word."""

    def take(self, index: Tensor) -> "_Words":
        return _Words(*(each.index_select(0, index) for each in self))


class _Switched(NamedTuple):
    """The replaced words and their translations."""

    words: _Words
    start: Tensor
    """int64 [N], index of the translation's first token in candidate_tokens."""
    size: Tensor
    """int64 [N], number of tokens of the translation."""
    target: Tensor
    """int64 [N], language of the translation."""
    follows: Tensor
    """bool [N], whether mode "mix" predicts the translation."""


def code_switch_reference(
    batch: CodeSwitchBatch, table: NgramTable, thresholds: Tensor, settings: CodeSwitchSettings
) -> CodeSwitchOutput:
    """Switches known words of a batch into other languages.

    A word starts where the flags of the token before or of the token itself set a boundary (`NgramTable.word_boundary`)
    or where `word_starts` is set, and ends where the next one starts. Words truncated by either edge of the source are
    never switched. Each known word draws four 32-bit words r0..r3 from Philox with key = seed and counter = (position
    of the word's first token, sample id low, sample id high, 0): r1 selects the translation and thereby the target
    language, r0 decides whether to switch (r0 < thresholds[source, target]), r3 selects the labels in mode "mix"; r2 is
    unused. Labels of the k-th token of a translation:

    - input_only: the word's own first token for k = 0, masked otherwise;
    - codeswitch: the translation's own tokens;
    - no_predict: masked;
    - mix: as codeswitch if r3 < 2^31, else as input_only, per word.

    A label is stored at the position before its token, as usual. The result has S positions: output past the end is
    truncated, source tokens beyond the first S+1 (the lookahead) fill a sequence that became shorter, and the remaining
    positions are filled with `pad_id` and loss mask 0.

    Args:
        batch: the sequences.
        table: on the same device.
        thresholds: int64 [L, L], `ratio_threshold` of each source and target language.
        settings: settings that are the same for all batches.

    Raises:
        ValueError: a shape, dtype, device or option is wrong.
    """
    check_inputs(batch, table, thresholds, settings)
    tokens, language, sample_id, word_starts = batch
    flags = table.word_boundary.index_select(0, tokens.view(-1)).view(tokens.shape)
    starts = _find_starts(flags, word_starts)
    known, key = _find_known(tokens, starts, language, table)
    switched = _decide(known, key, language, sample_id, table, thresholds, settings.seed)
    place, end = _output_positions(switched, tokens.shape)
    new = _expand(switched, place, settings.sequence_length)
    source = _source_indices(switched, new, tokens, settings.sequence_length)
    result = _write(tokens, switched, new, end, source, table, settings)
    counts = _count(flags, starts, known, switched, place, end, source, table, settings.sequence_length)
    return CodeSwitchOutput(*result, counts=counts)


def _find_starts(flags: Tensor, word_starts: Tensor | None) -> Tensor:
    starts = (flags & BOUNDARY_BEFORE) != 0
    # the token before the source is unknown, so the first token only has its own flag
    starts[:, 1:] |= (flags[:, :-1] & BOUNDARY_AFTER) != 0
    return starts if word_starts is None else starts | word_starts


def _find_known(tokens: Tensor, starts: Tensor, language: Tensor, table: NgramTable) -> tuple[_Words, Tensor]:
    """The words that the table contains, with their keys (int64 [N])."""
    width = tokens.shape[1]
    flat = starts.view(-1).nonzero().view(-1)
    row = flat.div(width, rounding_mode="floor")
    length = flat.diff()
    candidates = (row[1:] == row[:-1]) & (length <= 2 * table.columns) & (language.index_select(0, row[:-1]) >= 0)
    index = candidates.nonzero().view(-1)
    row, flat, length = (each.index_select(0, index) for each in (row, flat, length))
    columns = _pack_words(tokens.view(-1), flat, length, language.index_select(0, row), table.columns)
    key, found = lookup(table, columns)
    index = found.nonzero().view(-1)
    words = _Words(row, flat - row * width, length).take(index)
    return words, key.index_select(0, index)


def _pack_words(tokens: Tensor, start: Tensor, length: Tensor, language: Tensor, columns: int) -> list[Tensor]:
    """Packs words into the columns of a key, int64 [N] each."""

    def pair(start: Tensor, both: Tensor) -> Tensor:
        first = tokens.index_select(0, start).to(torch.int64) + 1
        # a word ends before its sequence does, so each of its tokens has a next token
        second = tokens.index_select(0, start + 1).to(torch.int64) + 1
        return first + (second << TOKEN_BITS) * both

    packed = [pack_first(pair(start, length > 1), language, (length - 1) >> 1)]
    for column in range(1, columns):
        longer = (length > 2 * column).nonzero().view(-1)
        values = pair(start.index_select(0, longer) + 2 * column, length.index_select(0, longer) > 2 * column + 1)
        packed.append(torch.zeros_like(packed[0]).index_copy_(0, longer, values))
    return packed


def _decide(
    known: _Words,
    key: Tensor,
    language: Tensor,
    sample_id: Tensor,
    table: NgramTable,
    thresholds: Tensor,
    seed: int,
) -> _Switched:
    sample = sample_id.index_select(0, known.row)
    counter = (known.position, sample & WORD, (sample >> 32) & WORD, torch.zeros_like(sample))
    decision, which, _, label = philox_4x32_10(counter, (seed & WORD, seed >> 32))
    # no threshold is above the highest: all but a few words are dropped here
    index = (decision < thresholds.max()).nonzero().view(-1)
    candidate = table.candidates.index_select(0, draw(table, key.index_select(0, index), which.index_select(0, index)))
    target = candidate >> TARGET_SHIFT
    source = language.index_select(0, known.row.index_select(0, index))
    threshold = thresholds.view(-1).index_select(0, source * table.num_languages + target)
    chosen = (decision.index_select(0, index) < threshold).nonzero().view(-1)
    index, candidate = index.index_select(0, chosen), candidate.index_select(0, chosen)
    return _Switched(
        words=known.take(index),
        start=candidate & WORD,
        size=(candidate >> LENGTH_SHIFT) & MAX_CANDIDATE_TOKENS,
        target=target.index_select(0, chosen),
        follows=label.index_select(0, index) < 1 << 31,
    )


def _output_positions(switched: _Switched, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Start of each translation in its output sequence (int64 [N]), and end of each output sequence (int64 [B])."""
    rows, width = shape
    row, position, length = switched.words
    growth = switched.size - length
    total = torch.zeros(rows, dtype=torch.int64, device=row.device).index_add_(0, row, growth)
    before = growth.cumsum(0) - growth - (total.cumsum(0) - total).index_select(0, row)
    return position + before, total + width


class _NewTokens(NamedTuple):
    """The tokens of all translations within the first S+1 positions, and the position after each (int64 [M])."""

    item: Tensor
    """Index of the switched word."""
    within: Tensor
    """Index within the translation; its length for the position after it."""
    after: Tensor
    """bool [M], whether this is the position after the translation."""
    where: Tensor
    """Index into the flattened result [B, S+1]."""


def _expand(switched: _Switched, place: Tensor, sequence: int) -> _NewTokens:
    count = switched.size + 1
    item = torch.repeat_interleave(count)
    # from the index in the list to the position in the result
    shift = place - (count.cumsum(0) - count)
    position = torch.arange(len(item), device=count.device) + shift.index_select(0, item)
    index = (position <= sequence).nonzero().view(-1)
    item, position = item.index_select(0, index), position.index_select(0, index)
    within = position - place.index_select(0, item)
    where = switched.words.row.index_select(0, item) * (sequence + 1) + position
    return _NewTokens(item, within, within == switched.size.index_select(0, item), where)


def _source_indices(switched: _Switched, new: _NewTokens, tokens: Tensor, sequence: int) -> Tensor:
    """Source position of each of S+1 positions (int64 [B, S+1]); for a translation, that of its word's first token."""
    rows, width = tokens.shape
    # the source advances by 1 per position, by 0 within a translation and by the word's length after it
    step = torch.ones((rows, sequence + 1), dtype=torch.int64, device=tokens.device)
    index = (new.within > 0).nonzero().view(-1)
    advance = switched.words.length.index_select(0, new.item) * new.after
    step.view(-1).index_copy_(0, new.where.index_select(0, index), advance.index_select(0, index))
    return step.cumsum(1).sub_(1).clamp_(max=width - 1)


def _write(
    tokens: Tensor,
    switched: _Switched,
    new: _NewTokens,
    end: Tensor,
    source: Tensor,
    table: NgramTable,
    settings: CodeSwitchSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """All outputs except the counts, in the order of `CodeSwitchOutput`."""
    rows, positions = source.shape
    original = tokens.gather(1, source).to(torch.int64)
    index = (~new.after).nonzero().view(-1)
    item, within, where = (each.index_select(0, index) for each in (new.item, new.within, new.where))
    written = table.candidate_tokens.index_select(0, switched.start.index_select(0, item) + within).to(torch.int64)
    stream = original.clone()
    stream.view(-1).index_copy_(0, where, written)

    scored = torch.ones((rows, positions), dtype=torch.bool, device=tokens.device)
    labels = original
    if settings.label_mode == "codeswitch":
        labels = stream
    elif settings.label_mode == "no_predict":
        scored.view(-1).index_fill_(0, where, False)
    else:
        # the word's first token is the label of the first token of its translation
        heads = within == 0
        if settings.label_mode == "mix":
            follows = switched.follows.index_select(0, item)
            predicted = follows.nonzero().view(-1)
            labels = original.clone()
            labels.view(-1).index_copy_(0, where.index_select(0, predicted), written.index_select(0, predicted))
            heads = heads | follows
        scored.view(-1).index_copy_(0, where, heads)

    order = torch.arange(positions, device=tokens.device)
    filled = order < end[:, None]
    scored &= filled
    new_tokens = torch.where(filled, stream, settings.pad_id)[:, :-1].contiguous()
    scored = scored[:, 1:]
    if settings.mask_eod:
        scored = scored & (new_tokens != settings.eod_id)
    position_ids = order[:-1].expand(rows, -1).contiguous()
    document_starts = None
    if settings.reset_at_eod:
        document_starts = document_starts_of(new_tokens, settings.eod_id, filled[:, :-1])
        position_ids -= document_starts
    return new_tokens, labels[:, 1:] * scored, scored.to(torch.float32), position_ids, document_starts


def document_starts_of(tokens: Tensor, eod_id: int | None, filled: Tensor | None = None) -> Tensor:
    """Start of the document of every position.

    Args:
        tokens: int64 [B, S].
        eod_id: the token that ends a document.
        filled: bool [B, S], False for padding, whose start is the position itself; None if there is no padding.

    Returns:
        int32 [B, S].
    """
    order = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    starts = torch.zeros(tokens.shape, dtype=torch.int32, device=tokens.device)
    starts[:, 1:] = order[1:] * (tokens[:, :-1] == eod_id)
    starts = starts.cummax(dim=1).values
    return starts if filled is None else torch.where(filled, starts, order)


def _count(
    flags: Tensor,
    starts: Tensor,
    known: _Words,
    switched: _Switched,
    place: Tensor,
    end: Tensor,
    source: Tensor,
    table: NgramTable,
    sequence: int,
) -> Tensor:
    """int64 [B, 5 + L], see `CodeSwitchOutput.counts`."""
    rows, width = flags.shape
    order = torch.arange(width, device=flags.device)
    last = source[:, sequence - 1]
    reached = order <= last[:, None]
    running = starts & reached
    if table.counts_letters:
        running &= (flags & HAS_LETTER) != 0
    written = (place < sequence).nonzero().view(-1)
    row, target = switched.words.row.index_select(0, written), switched.target.index_select(0, written)
    known_row = known.row.index_select(0, (known.position <= last.index_select(0, known.row)).nonzero().view(-1))

    # tokens after the last source token that reached the output, except those replaced by a translation
    word, start, length = switched.words
    replaced = (start + length).clamp(max=sequence) - torch.maximum(start, last.index_select(0, word)) - 1
    truncated = (sequence - 1 - last).clamp(min=0).index_add_(0, word, replaced.clamp(min=0), alpha=-1)
    columns = (
        running.sum(1),
        torch.bincount(known_row, minlength=rows),
        torch.bincount(row, minlength=rows),
        (sequence - end).clamp(min=0),
        truncated,
    )
    counts = torch.zeros((rows, LANGUAGES_FROM + table.num_languages), dtype=torch.int64, device=flags.device)
    counts[:, :LANGUAGES_FROM] = torch.stack(columns, dim=1)
    counts.view(-1).index_add_(0, row * counts.shape[1] + LANGUAGES_FROM + target, torch.ones_like(row))
    return counts

"""Code-switching of a batch in plain torch: the definition that every faster kernel must repeat bit by bit.

Known words of the input are replaced by translations, the labels stay in the original language. Everything that
decides is integer arithmetic on (seed, sample id, position, tokens of the word), so a row comes out the same on any
device, in any batch and after any resume. Nothing here waits for the device: shapes never depend on data.

Shapes: B rows, S positions; the input has S+1 tokens so that every position has a label.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prealign.kernels.ngram_table import (
    BOUNDARY_AFTER,
    BOUNDARY_BEFORE,
    HAS_LETTER,
    MAX_NGRAM,
    TOKEN_BITS,
    NgramTable,
    draw,
    lookup,
    pack_first,
)
from megatron_prealign.kernels.philox import WORD, philox_4x32_10

LABEL_MODES = ("input_only", "codeswitch", "no_predict", "mix")
COUNTS_BEFORE_LANGUAGES = 3
"""counts[0..2] are running, known and switched words; counts[3 + language] the words switched into that language."""

# lifts (first candidate token - position) above zero, so that zero can mean "not switched"
_LIFT = 1 << 40


class CodeSwitchOutput(NamedTuple):
    """A batch ready for the model."""

    tokens: Tensor
    """int64 [B, S], model input."""
    labels: Tensor
    """int64 [B, S], 0 where nothing is to be predicted (vocabulary-parallel cross entropy takes no negative label)."""
    loss_mask: Tensor
    """float32 [B, S], 1 where the label counts, else 0."""
    position_ids: Tensor
    """int64 [B, S], 0..S-1."""
    counts: Tensor
    """int64 [3 + languages] of this batch: running, known and switched words, words switched into each language.

    A running word lies whole in the window and, where the table knows letters, its first token contains one."""


class _Words(NamedTuple):
    """Words of the window, by the position of their first token (width S+1)."""

    starts: Tensor
    """bool [B, S+1], a word starts here."""
    short: Tensor
    """bool [B, S+1], a word starts here that ends inside the window and fits the table's columns."""
    columns: list[Tensor]
    """int64 [B, S+1] each, the word packed as a table key."""


def ratio_threshold(ratio: float) -> int:
    """Threshold of 32 random bits below which a word is switched: never for ratio 0, always for ratio 1."""
    return round(ratio * (1 << 32))


def code_switch_reference(
    tokens: Tensor,
    language: Tensor,
    sample_id: Tensor,
    table: NgramTable,
    *,
    seed: int,
    thresholds: Tensor,
    label_mode: str,
    pad_id: int,
    eod_id: int | None = None,
) -> CodeSwitchOutput:
    """Switches known words of a batch into other languages.

    A word starts where the token before allows it or the token itself demands it (`NgramTable.word_boundary`), and ends
    where the next one starts. Words cut by either edge of the window are never touched, so the last token never is.
    Each occurrence of a word draws four 32-bit words r0..r3 from Philox with key = seed and counter = (position of the
    word's first token, sample id low, sample id high, 0): r1 chooses the target language, r2 the candidate, r0 whether
    to switch (r0 < thresholds[target]), r3 the labels in mode "mix". Labels of the k-th token of a translation:

    - input_only: the first one predicts the word's own first token, the others nothing;
    - codeswitch: the translation's own tokens;
    - no_predict: nothing;
    - mix: as codeswitch if r3 < 2^31, else as input_only, per word.

    "Predicts" is seen from the position before, as always. The result has S positions: what grows past the end is cut,
    what is missing is filled with `pad_id` and loss mask 0.

    Args:
        tokens: int32 or int64 [B, S+1].
        language: integer [B], index into the table's languages; -1 for a row that is never switched.
        sample_id: int64 [B], must not repeat within a run, or words repeat their draws.
        table: on the same device.
        seed: 0 to 2^64-1.
        thresholds: int64 [languages], `ratio_threshold` of each target language.
        label_mode: one of LABEL_MODES.
        pad_id: token that fills up rows which became shorter.
        eod_id: if given, positions whose input is this token get loss mask 0.

    Raises:
        ValueError: a shape, dtype, device or option is wrong.
    """
    _check_inputs(tokens, language, sample_id, table, seed, thresholds, label_mode)
    words = _find_words(tokens, language, table)
    key, known = lookup(table, words.columns, words.short)
    random = _random_words(tokens, sample_id, seed)
    switched, target, candidate = _decide(table, key, known, random, thresholds)
    follows = random[3] < 1 << 31 if label_mode == "mix" else None
    result = _expand(tokens, words, switched, candidate, table, label_mode, follows, pad_id)
    new_tokens, labels, scored = result
    if eod_id is not None:
        scored = scored & (new_tokens != eod_id)
    rows, positions = new_tokens.shape
    return CodeSwitchOutput(
        tokens=new_tokens,
        labels=labels,
        loss_mask=scored.to(torch.float32),
        position_ids=torch.arange(positions, device=tokens.device).expand(rows, positions).contiguous(),
        counts=_count(tokens, words.starts, known, switched, target, table),
    )


def _check_inputs(
    tokens: Tensor,
    language: Tensor,
    sample_id: Tensor,
    table: NgramTable,
    seed: int,
    thresholds: Tensor,
    label_mode: str,
) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"tokens is {tokens.dtype} {list(tokens.shape)}, expected int32 or int64 [batch, sequence + 1]"
        )
    rows = tokens.shape[0]
    if language.shape != (rows,) or language.dtype.is_floating_point or language.dtype == torch.bool:
        raise ValueError(f"language is {language.dtype} {list(language.shape)}, expected integers [{rows}]")
    if sample_id.shape != (rows,) or sample_id.dtype != torch.int64:
        raise ValueError(f"sample_id is {sample_id.dtype} {list(sample_id.shape)}, expected int64 [{rows}]")
    if thresholds.shape != (table.num_languages,) or thresholds.dtype != torch.int64:
        raise ValueError(
            f"thresholds is {thresholds.dtype} {list(thresholds.shape)}, expected int64 [{table.num_languages}]"
        )
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}, expected 0 to 2^64-1")
    if label_mode not in LABEL_MODES:
        raise ValueError(f"label_mode is {label_mode!r}, expected one of {', '.join(LABEL_MODES)}")
    devices = {each.device for each in (tokens, language, sample_id, thresholds, table.slot_key)}
    if len(devices) > 1:
        raise ValueError(f"tokens, language, sample_id, thresholds and table lie on {devices}, expected one device")


def _flags(tokens: Tensor, table: NgramTable) -> Tensor:
    return table.word_boundary.index_select(0, tokens.reshape(-1)).view(tokens.shape)


def _find_words(tokens: Tensor, language: Tensor, table: NgramTable) -> _Words:
    rows, width = tokens.shape
    flags = _flags(tokens, table)
    starts = (flags & BOUNDARY_BEFORE) != 0
    # the token before the window is unknown: only the first token's own flag counts there
    starts[:, 1:] |= (flags[:, :-1] & BOUNDARY_AFTER) != 0

    # one n-gram of columns past the end, where no word starts, lets every look ahead be a plain slice
    inside = torch.ones((rows, width + MAX_NGRAM), dtype=torch.bool, device=tokens.device)
    torch.logical_not(starts, out=inside[:, :width])
    stored = torch.zeros((rows, width + MAX_NGRAM), dtype=torch.int64, device=tokens.device)
    torch.add(tokens, 1, out=stored[:, :width])

    # two tokens of one word to a pair, by the position of the first; a second token that starts a word is left out
    pair = stored[:, :-1] + ((stored << TOKEN_BITS) * inside)[:, 1:]
    # no word starts at the next two positions
    two_more = inside[:, 1:-1] & inside[:, 2:]
    columns = [pack_first(pair[:, :width], language[:, None])]
    reaches = two_more[:, :width]
    for ahead in range(2, 2 * len(table.multipliers), 2):
        columns.append(pair[:, ahead : ahead + width] * reaches)
        reaches = reaches & two_more[:, ahead : ahead + width]
    return _Words(starts=starts, short=starts & ~reaches, columns=columns)


def _random_words(tokens: Tensor, sample_id: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    position = torch.arange(tokens.shape[1], device=tokens.device)[None, :]
    sample = sample_id[:, None]
    counter = (position, sample & WORD, (sample >> 32) & WORD, torch.zeros_like(sample))
    return philox_4x32_10(counter, (seed & WORD, seed >> 32))


def _decide(
    table: NgramTable, key: Tensor, known: Tensor, random: tuple[Tensor, ...], thresholds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each known word is switched, into which language, to which candidate (both arbitrary where it is not)."""
    shape = key.shape
    decision, language_draw, candidate_draw = (each.reshape(-1) for each in random[:3])
    entry = draw(table.key_entries, table.entry_bound, key.view(-1), language_draw, table.entry_steps)
    target = table.entry_language.index_select(0, entry)
    switched = known & (decision < thresholds.index_select(0, target)).view(shape)
    # the few switched words draw from their own entry, all else from entry 0, which stays in cache
    entry = entry * switched.view(-1)
    candidate = draw(table.entry_candidates, table.candidate_bound, entry, candidate_draw, table.candidate_steps)
    return switched, target.view(shape), candidate.view(shape)


def _whole_words(first: Tensor, starts: Tensor) -> Tensor:
    """Spreads marks on first tokens over their words of at most MAX_NGRAM tokens."""
    marked, joined, reach = first.clone(), ~starts, 1
    while reach < MAX_NGRAM:
        marked[:, reach:] |= marked[:, :-reach] & joined[:, reach:]
        # the right-hand side is complete before it is stored, so a mark moves by `reach` only once
        joined[:, reach:] = joined[:, reach:] & joined[:, :-reach]
        reach *= 2
    return marked


def _expand(
    tokens: Tensor,
    words: _Words,
    switched: Tensor,
    candidate: Tensor,
    table: NgramTable,
    label_mode: str,
    follows: Tensor | None,
    pad_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """New tokens, labels (int64 [B, S]) and whether each label exists (bool [B, S])."""
    rows, width = tokens.shape
    flat = candidate.view(-1)
    length = table.candidate_length.index_select(0, flat).view(rows, width)
    begin = table.candidate_begin.index_select(0, flat).view(rows, width)
    size = length * switched + ~_whole_words(switched, words.starts)
    end = size.cumsum(dim=1)
    place = end - size

    # A new position comes from the last source token that begins at or before it. The dropped tokens of a switched word
    # begin where the next word does, so they are never the last.
    beginning = torch.zeros((rows, width + 1), dtype=torch.int64, device=tokens.device)
    beginning.scatter_add_(1, place.clamp(max=width), torch.ones_like(place))
    source = beginning[:, :width].cumsum(dim=1) - 1

    position = torch.arange(width, device=tokens.device)
    lifted = ((begin - place + _LIFT) * switched).gather(1, source)
    translated = lifted != 0
    index = (lifted + (position - _LIFT)).clamp_(min=0)
    original = tokens.to(torch.int64).gather(1, source)
    replacement = table.candidate_tokens.index_select(0, index.view(-1)).view(rows, width)
    stream = original + (replacement - original) * translated

    labels, scored = original[:, 1:], ~translated[:, 1:]
    if label_mode == "codeswitch":
        labels, scored = stream[:, 1:], torch.ones_like(scored)
    elif label_mode != "no_predict":
        # the word's first token stands at the head of its translation
        scored = scored | (source[:, 1:] != source[:, :-1])
    if follows is not None:
        follows = follows.gather(1, source)[:, 1:]
        labels = labels + (stream[:, 1:] - labels) * follows
        scored = scored | follows
    filled = end[:, -1:] > position
    scored = scored & filled[:, 1:]
    new_tokens = (stream - pad_id) * filled + pad_id
    return new_tokens[:, :-1].contiguous(), labels * scored, scored


def _count(
    tokens: Tensor, starts: Tensor, known: Tensor, switched: Tensor, target: Tensor, table: NgramTable
) -> Tensor:
    position = torch.arange(tokens.shape[1], device=tokens.device)
    # the last word of a row has no end in the window
    last_start = (starts * position).amax(dim=1, keepdim=True)
    running = starts & (position < last_start)
    if table.counts_letters:
        running &= (_flags(tokens, table) & HAS_LETTER) != 0
    per_language = [(switched & (target == language)).sum() for language in range(table.num_languages)]
    return torch.stack([running.sum(), known.sum(), switched.sum(), *per_language])

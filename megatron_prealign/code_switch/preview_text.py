"""Renders a preview as text: colours on a terminal, brackets elsewhere."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_prealign.code_switch.preview import Part, Preview, PreviewSample
from megatron_prealign.text import plural
from megatron_prealign.tokenizer.clone import CLONE_OPEN

SIDE_BY_SIDE_WIDTH = 132
"""Minimum terminal width for original and result side by side."""
_LABEL_TABLE_WIDTH = 100
_DIM = "2"
# bold, in colours that are readable on black and on white
_LANGUAGE_CODES = ("1;32", "1;36", "1;35", "1;34", "1;33", "1;31")
_GAP = " │ "
_LEADING_SPACE = re.compile(rf"({CLONE_OPEN}?)(\s+)")

Run = tuple[str, str]
"""Text and its ANSI code, empty for plain text."""


@dataclass(frozen=True)
class TextStyle:
    """Style of the output."""

    color: bool = False
    """Mark words with colour and bold, otherwise as [word] and {translation}."""
    width: int | None = None
    """Width of the terminal in columns; None writes each text on one line."""


def split_space(text: str) -> tuple[str, str]:
    """Leading white space of a word, and the word, or "…" if the sequence ends after the space. The brackets of clone
    text stay with the word."""
    match = _LEADING_SPACE.match(text)
    space, word = (match[2], match[1] + text[match.end() :]) if match else ("", text)
    return space, word or "…"


def visible(text: str) -> str:
    """`text` for one line of a terminal, with line breaks and control characters replaced by symbols."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in "\n\u2028\u2029":
        return "⏎ "
    if character == "\t":
        return " "
    if unicodedata.category(character) != "Cc":
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "␡"


def display_width(text: str) -> int:
    """Width of `text` on a terminal, in columns."""
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def render_preview(preview: Preview, style: TextStyle, *, labels: bool = False) -> Iterator[str]:
    """Yields the lines of all samples and of the totals.

    Args:
        preview: the preview to render.
        style: colours and width.
        labels: also show each sample's input tokens above their labels.
    """
    codes = language_codes(preview)
    for number, sample in enumerate(preview.samples, start=1):
        yield _paint([(caption(sample, number), _DIM)], style.color)
        yield from _render_sample(sample, style, codes)
        if labels:
            yield from _render_labels(sample, preview, style, codes)
        yield ""
    yield from _render_totals(preview)


def language_codes(preview: Preview) -> dict[str, str]:
    """ANSI code of every target language."""
    return {language: _LANGUAGE_CODES[index % len(_LANGUAGE_CODES)] for index, language in enumerate(preview.ratios)}


def caption(sample: PreviewSample, number: int) -> str:
    """Summary of a sample in one line."""
    running, _, switched, padded, truncated = sample.counts[:5]
    text = f"sample {number} ({sample.language}): {switched} of {plural(running, 'word')} switched"
    text += f", {plural(truncated, 'token')} truncated" if truncated else ""
    return text + (f", {plural(padded, 'position')} padded" if padded else "")


def _render_sample(sample: PreviewSample, style: TextStyle, codes: Mapping[str, str]) -> Iterator[str]:
    original = list(_runs(((part, part.source) for part in sample.parts), ("[", "]"), style.color, codes))
    result = list(_runs(((part, part.output) for part in sample.parts), ("{", "}"), style.color, codes))
    names = ("original  ", "switched  ")
    if style.width is None:
        for name, runs in zip(names, (original, result), strict=True):
            # without the leading space of the first word
            first = [(text.lstrip(), code) for text, code in runs[:1]]
            yield f"  {name}{_paint([*first, *runs[1:]], style.color)}"
        return
    if style.width >= SIDE_BY_SIDE_WIDTH and not _has_right_to_left(sample):
        column = (style.width - 2 - len(_GAP)) // 2
        left, right = wrap(original, column), wrap(result, column)
        yield _paint([(f"  {'original':<{column}}{_GAP}switched", _DIM)], style.color)
        for index in range(max(len(left), len(right))):
            left_line = left[index] if index < len(left) else []
            right_line = right[index] if index < len(right) else []
            fill = " " * (column - sum(display_width(text) for text, _ in left_line))
            yield f"  {_paint(left_line, style.color)}{fill}{_GAP}{_paint(right_line, style.color)}".rstrip()
        return
    for name, runs in zip(names, (original, result), strict=True):
        for index, line in enumerate(wrap(runs, max(style.width - 2 - len(name), 20))):
            yield f"  {name if index == 0 else ' ' * len(name)}{_paint(line, style.color)}"


def _has_right_to_left(sample: PreviewSample) -> bool:
    """Whether two columns would be mixed up: terminals that reorder right-to-left text reorder full lines."""
    return any(
        unicodedata.bidirectional(character) in ("R", "AL")
        for part in sample.parts
        for character in part.source + part.output
    )


def _runs(
    parts: Iterable[tuple[Part, str]], brackets: tuple[str, str], color: bool, codes: Mapping[str, str]
) -> Iterator[Run]:
    for part, text in parts:
        if part.language is None:
            yield visible(text), ""
            continue
        space, word = split_space(text)
        yield visible(space), ""
        yield (visible(word), codes[part.language]) if color else (f"{brackets[0]}{visible(word)}{brackets[1]}", "")


def _paint(runs: Iterable[Run], color: bool) -> str:
    return "".join(f"\x1b[{code}m{text}\x1b[0m" if color and code and text else text for text, code in runs)


def wrap(runs: Iterable[Run], width: int) -> list[list[Run]]:
    """Breaks text into lines at white space and between wide characters, and inside a word longer than a line.

    Args:
        runs: the text.
        width: columns per line, at least 2.
    """
    lines: list[list[Run]] = [[]]
    used = 0
    for word, spaced in _words(runs):
        columns = sum(_character_width(character) for character, _ in word)
        space = 1 if spaced and used else 0
        if used and used + space + columns > width:
            lines.append([])
            used, space = 0, 0
        if space:
            lines[-1].append((" ", ""))
            used += 1
        for character, code in word:
            size = _character_width(character)
            if used + size > width:
                lines.append([])
                used = 0
            lines[-1].append((character, code))
            used += size
    return [_merge_runs(line) for line in lines]


def _words(runs: Iterable[Run]) -> Iterator[tuple[list[Run], bool]]:
    """Yields unbreakable units as single characters, and whether white space precedes them."""
    word: list[Run] = []
    spaced = False
    for character, code in ((character, code) for text, code in runs for character in text):
        wide = _character_width(character) == 2
        if character.isspace() or wide or (word and _character_width(word[-1][0]) == 2):
            # a combining mark stays with its wide character
            if word and _character_width(character) == 0:
                word.append((character, code))
                continue
            if word:
                yield word, spaced
                word, spaced = [], False
        if character.isspace():
            spaced = True
        else:
            word.append((character, code))
    if word:
        yield word, spaced


def _merge_runs(characters: Sequence[Run]) -> list[Run]:
    groups = groupby(characters, key=lambda run: run[1])
    return [("".join(character for character, _ in group), code) for code, group in groups]


def _render_labels(
    sample: PreviewSample, preview: Preview, style: TextStyle, codes: Mapping[str, str]
) -> Iterator[str]:
    """Yields the input tokens with their labels below them, in blocks as wide as the terminal."""
    columns = []
    for position, (token, label, target) in enumerate(zip(sample.tokens, sample.labels, sample.targets, strict=True)):
        cells = (str(position), token_name(preview, token), "–" if label is None else token_name(preview, label))
        if target is not None and not style.color:
            cells = (cells[0], f"{{{cells[1]}}}", cells[2])
        columns.append((cells, max(map(display_width, cells)), codes[target] if target is not None else ""))
    names = ("position", "input", "label")
    block_width = max((style.width or _LABEL_TABLE_WIDTH) - 12, 20)
    start = 0
    while start < len(columns):
        end, used = start, 0
        while end < len(columns) and (end == start or used + columns[end][1] + 2 <= block_width):
            used += columns[end][1] + 2
            end += 1
        for line, name in enumerate(names):
            runs: list[Run] = [(f"  {name:<10}", _DIM)]
            for cells, width, code in columns[start:end]:
                cell_code = code if line == 1 else (_DIM if line == 0 else "")
                runs += [(cells[line], cell_code), (" " * (width - display_width(cells[line]) + 2), "")]
            yield _paint(runs, style.color).rstrip()
        start = end


def token_name(preview: Preview, token: int) -> str:
    """Text of a token with visible spaces; its id if it is an incomplete character."""
    text = preview.text.text([token])
    if "\N{REPLACEMENT CHARACTER}" in text:
        return f"#{token}"
    return visible(text.replace("\n", "⏎")).replace(" ", "▁")


def totals_table(preview: Preview) -> list[tuple[str, str, str]]:
    """Name, value and remark of every total."""
    words = "running words" if preview.section.ratio_of == "words" else "known words"
    ratios = dict.fromkeys(preview.ratios.values())
    requested = (
        f"{next(iter(ratios)):g} of the {words}"
        if len(ratios) == 1
        else ", ".join(f"{language} {ratio:g}" for language, ratio in preview.ratios.items()) + f" of the {words}"
    )
    table = [
        ("samples", f"{len(preview.samples):,}", f"of {plural(preview.seq_length, 'token')}, seed {preview.seed}"),
        *(
            ("skipped documents", f"{count:,}", f"in {language}, a language without keys")
            for language, count in preview.skipped.items()
        ),
        ("requested ratio", "", f"{requested}, {preview.section.label_mode}"),
        ("running words", f"{preview.running:,}", ""),
        ("known", f"{preview.known:,}", f"{_share(preview.known, preview.running)} of the running words"),
        (
            "switched",
            f"{preview.switched:,}",
            f"{_share(preview.switched, preview.running)} of the running words, "
            f"{_share(preview.switched, preview.known)} of the known words",
        ),
    ]
    for language, count in preview.by_language.items():
        table.append((f"into {language}", f"{count:,}", f"{_share(count, preview.switched)} of the switched words"))
    lengths = preview.token_lengths
    if lengths is not None:
        before, after = lengths
        remark = f"{before:.2f} before, {after:.2f} after"
        table.append(("tokens per switched word", f"{after - before:+.2f}", remark))
    table.append(("padded", f"{preview.padded:,}", f"{_share(preview.padded, preview.positions)} of the positions"))
    remark = f"{_share(preview.truncated, preview.positions)} of the positions; they no longer fit into their samples"
    table.append(("truncated tokens", f"{preview.truncated:,}", remark))
    return table


def _share(count: int, total: int) -> str:
    return f"{count / total:.2%}" if total else "–"


def _render_totals(preview: Preview) -> Iterator[str]:
    table = totals_table(preview)
    widths = [max(len(line[column]) for line in table) for column in (0, 1)]
    for name, value, remark in table:
        yield f"{name:<{widths[0]}}  {value:>{widths[1]}}  {remark}".rstrip()
    if not preview.switched:
        yield "no word was switched in these samples"

"""A preview as text: colours on a terminal, brackets elsewhere."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_prealign.code_switch.preview import Part, Preview, PreviewRow
from megatron_prealign.tokenizer.clone import CLONE_OPEN

SIDE_BY_SIDE_WIDTH = 132
"""Columns of a terminal from which on original and result stand beside each other."""
_LABEL_TABLE_WIDTH = 100
_DIM = "2"
# bold, and a colour that can be read on black and on white
_LANGUAGE_CODES = ("1;32", "1;36", "1;35", "1;34", "1;33", "1;31")
_GAP = " │ "
_SPACE_IN_FRONT = re.compile(rf"({CLONE_OPEN}?)(\s+)")

Run = tuple[str, str]
"""Text and the code of its look, empty for plain."""


@dataclass(frozen=True)
class TextStyle:
    """How to write."""

    color: bool = False
    """Marks by colour and bold, otherwise [word] and {translation}."""
    width: int | None = None
    """Columns of the terminal; None writes each text as one line."""


def split_space(text: str) -> tuple[str, str]:
    """The white space in front of a word, and the word, "…" where the row ends before it begins. The brackets of clone
    text stay with the word."""
    match = _SPACE_IN_FRONT.match(text)
    space, word = (match[2], match[1] + text[match.end() :]) if match else ("", text)
    return space, word or "…"


def visible(text: str) -> str:
    """`text` for one line of a terminal: line breaks as a sign, and no character that would steer the terminal."""
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
    """Columns that `text` takes on a terminal."""
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def render_preview(preview: Preview, look: TextStyle, *, labels: bool = False) -> Iterator[str]:
    """The lines of all rows and of the totals.

    Args:
        preview: what to show.
        look: colours and width.
        labels: show each row's input tokens over their labels, too.
    """
    codes = language_codes(preview)
    for number, row in enumerate(preview.rows, start=1):
        yield _paint([(caption(row, number), _DIM)], look.color)
        yield from _render_row(row, look, codes)
        if labels:
            yield from _render_labels(row, preview, look, codes)
        yield ""
    yield from _render_totals(preview)


def language_codes(preview: Preview) -> dict[str, str]:
    """The look of every target language."""
    return {language: _LANGUAGE_CODES[number % len(_LANGUAGE_CODES)] for number, language in enumerate(preview.ratios)}


def caption(row: PreviewRow, number: int) -> str:
    """What happened to a row, in one line."""
    running, _, switched, padded, truncated = row.counts[:5]
    text = f"row {number} ({row.language}): {switched} of {running} words switched"
    text += f", {_counted(truncated, 'token')} cut at the end" if truncated else ""
    return text + (f", {_counted(padded, 'position')} padded" if padded else "")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _render_row(row: PreviewRow, look: TextStyle, codes: Mapping[str, str]) -> Iterator[str]:
    original = list(_runs(((part, part.source) for part in row.parts), ("[", "]"), look.color, codes))
    result = list(_runs(((part, part.output) for part in row.parts), ("{", "}"), look.color, codes))
    names = ("original  ", "switched  ")
    if look.width is None:
        for name, runs in zip(names, (original, result), strict=True):
            # the space before a row's first word
            first = [(text.lstrip(), code) for text, code in runs[:1]]
            yield f"  {name}{_paint([*first, *runs[1:]], look.color)}"
        return
    if look.width >= SIDE_BY_SIDE_WIDTH and not _has_right_to_left(row):
        column = (look.width - 2 - len(_GAP)) // 2
        left, right = wrap(original, column), wrap(result, column)
        yield _paint([(f"  {'original':<{column}}{_GAP}switched", _DIM)], look.color)
        for number in range(max(len(left), len(right))):
            here = left[number] if number < len(left) else []
            there = right[number] if number < len(right) else []
            fill = " " * (column - sum(display_width(text) for text, _ in here))
            yield f"  {_paint(here, look.color)}{fill}{_GAP}{_paint(there, look.color)}".rstrip()
        return
    for name, runs in zip(names, (original, result), strict=True):
        for number, line in enumerate(wrap(runs, max(look.width - 2 - len(name), 20))):
            yield f"  {name if number == 0 else ' ' * len(name)}{_paint(line, look.color)}"


def _has_right_to_left(row: PreviewRow) -> bool:
    """Terminals that turn such text around turn whole lines, and would mix up two columns."""
    return any(
        unicodedata.bidirectional(character) in ("R", "AL")
        for part in row.parts
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
        width: columns of a line, from 2.
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
    return [_joined(line) for line in lines]


def _words(runs: Iterable[Run]) -> Iterator[tuple[list[Run], bool]]:
    """What a line must not be broken in, as single characters, and whether white space stands in front."""
    word: list[Run] = []
    spaced = False
    for character, code in ((character, code) for text, code in runs for character in text):
        wide = _character_width(character) == 2
        if character.isspace() or wide or (word and _character_width(word[-1][0]) == 2):
            # a mark that combines with a wide character stays with it
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


def _joined(characters: Sequence[Run]) -> list[Run]:
    groups = groupby(characters, key=lambda run: run[1])
    return [("".join(character for character, _ in group), code) for code, group in groups]


def _render_labels(row: PreviewRow, preview: Preview, look: TextStyle, codes: Mapping[str, str]) -> Iterator[str]:
    """The input tokens with what each is to predict below it, in blocks as wide as the terminal."""
    columns = []
    for position, (token, label, target) in enumerate(zip(row.tokens, row.labels, row.targets, strict=True)):
        cells = (str(position), token_name(preview, token), "–" if label is None else token_name(preview, label))
        if target is not None and not look.color:
            cells = (cells[0], f"{{{cells[1]}}}", cells[2])
        columns.append((cells, max(map(display_width, cells)), codes[target] if target is not None else ""))
    names = ("position", "input", "label")
    room = max((look.width or _LABEL_TABLE_WIDTH) - 12, 20)
    begin = 0
    while begin < len(columns):
        end, used = begin, 0
        while end < len(columns) and (end == begin or used + columns[end][1] + 2 <= room):
            used += columns[end][1] + 2
            end += 1
        for line, name in enumerate(names):
            runs: list[Run] = [(f"  {name:<10}", _DIM)]
            for cells, width, code in columns[begin:end]:
                look_of_cell = code if line == 1 else (_DIM if line == 0 else "")
                runs += [(cells[line], look_of_cell), (" " * (width - display_width(cells[line]) + 2), "")]
            yield _paint(runs, look.color).rstrip()
        begin = end


def token_name(preview: Preview, token: int) -> str:
    """A token's text with its spaces visible; its id where it holds only a part of a character."""
    text = preview.text.text([token])
    if "\N{REPLACEMENT CHARACTER}" in text:
        return f"#{token}"
    return visible(text.replace("\n", "⏎")).replace(" ", "▁")


def totals_table(preview: Preview) -> list[tuple[str, str, str]]:
    """Name, number and remark of every total."""
    words = "running words" if preview.section.ratio_of == "words" else "known words"
    ratios = dict.fromkeys(preview.ratios.values())
    asked = (
        f"{next(iter(ratios)):g} of the {words}"
        if len(ratios) == 1
        else ", ".join(f"{language} {ratio:g}" for language, ratio in preview.ratios.items()) + f" of the {words}"
    )
    table = [
        ("rows", f"{len(preview.rows):,}", f"of {preview.seq_length:,} tokens, seed {preview.seed}"),
        ("ratio asked for", "", f"{asked}, {preview.section.label_mode}"),
        ("running words", f"{preview.running:,}", ""),
        ("known", f"{preview.known:,}", f"{_share(preview.known, preview.running)} of the running words"),
        (
            "switched",
            f"{preview.switched:,}",
            f"{_share(preview.switched, preview.running)} of the running words, "
            f"{_share(preview.switched, preview.known)} of the known",
        ),
    ]
    for language, count in preview.by_language.items():
        table.append((f"into {language}", f"{count:,}", f"{_share(count, preview.switched)} of the switched"))
    lengths = preview.token_lengths
    if lengths is not None:
        before, after = lengths
        remark = f"{before:.2f} before, {after:.2f} after"
        table.append(("tokens a switched word", f"{after - before:+.2f}", remark))
    table.append(("padded", f"{preview.padded:,}", f"{_share(preview.padded, preview.positions)} of the positions"))
    cut = f"{_share(preview.truncated, preview.positions)} of the positions, no longer fit into their rows"
    table.append(("tokens cut", f"{preview.truncated:,}", cut))
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"


def _render_totals(preview: Preview) -> Iterator[str]:
    table = totals_table(preview)
    widths = [max(len(line[column]) for line in table) for column in (0, 1)]
    for name, number, remark in table:
        yield f"{name:<{widths[0]}}  {number:>{widths[1]}}  {remark}".rstrip()
    if not preview.switched:
        yield "nothing was switched in these rows"

"""Renders a dictionary report as a single HTML page without external resources or scripts."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_prealign import page
from megatron_prealign.text import shorten

_STYLE = """
svg text { fill: var(--ink); font-size: 13px } svg .muted { fill: var(--muted) }
svg .first { fill: var(--first) } svg .second { fill: var(--second) } svg .track { fill: var(--panel) }
.words { columns: 14rem; font-size: .92rem; padding-left: 1.4rem } .words span { color: var(--muted) }
.samples { list-style: none; padding: 0 } .samples li { background: var(--panel); padding: .6rem .9rem;
  border-radius: 6px; margin: .5rem 0 }
del { color: var(--muted) } ins { background: var(--mark); text-decoration: none; font-weight: 600; padding: .05em .2em;
  border-radius: 3px }
"""
_COLOURS = {"--first": ("#0072b2", "#58a6e0"), "--second": ("#d55e00", "#ff8c42"), "--mark": ("#fff3c4", "#574a10")}

_MOST_TRANSLATIONS = 5
_BAR_HEIGHT, _ROW_HEIGHT, _WIDTH, _LABEL_WIDTH, _VALUE_WIDTH = 14, 22, 720, 190, 70
_MAX_LABEL_LENGTH = 24


def render_page(report: Mapping[str, Any]) -> str:
    """Renders a report of `make_report` as an HTML page."""
    table = report["table"]
    parts = [
        f"<h1>Dictionary report: {escape(', '.join(table['languages']))}</h1>",
        f"<p>{table['groups']:,} groups of {table['words']:,} words; {table['keys']:,} keys with "
        f"{table['candidates']:,} translations. Switch rates are for a ratio of {report['settings']['ratio']:g}.</p>",
        "<h2>Corpora</h2>",
        _corpora_table(report["corpora"]),
        *(_corpus(corpus) for corpus in report["corpora"]),
        "<h2>Dictionary table</h2>",
        _sources(table["sources"]),
        _rules(table["build"]),
        "<h2>Definitions</h2>",
        page.definitions(report["definitions"]),
    ]
    body = "\n".join(part for part in parts if part)
    return page.render("Dictionary report", body, style=_STYLE, colours=_COLOURS)


def _corpora_table(corpora: Sequence[Mapping[str, Any]]) -> str:
    header = [
        *("corpus", "target", "coverage", "vocabulary", "switch rate", "tokens per word", "growth"),
        *("translations per word", "more than one"),
    ]
    rows: list[list[str]] = []
    for corpus in corpora:
        name = f"{escape(corpus['prefix'])} ({escape(corpus['language'])})"
        for pair in _totals_and_pairs(corpus):
            rows.append(
                [
                    name,
                    escape(pair.get("target", "all")),
                    _percent(pair["coverage"]),
                    _percent(pair["vocabulary_coverage"]),
                    _percent(pair["switch_rate"], 2),
                    _change(pair["tokens_before"], pair["tokens_after"]),
                    f"{pair['growth']:+.2%}",
                    page.decimal(pair.get("translations_per_word")),
                    _percent(pair.get("ambiguous_share")),
                ]
            )
    return page.table(header, rows)


def _totals_and_pairs(corpus: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The corpus totals followed by each language pair; a single pair equals the totals."""
    pairs = list(corpus["pairs"])
    return pairs if len(pairs) == 1 else [corpus, *pairs]


def _corpus(corpus: Mapping[str, Any]) -> str:
    words = f"{corpus['running_words']:,} running words, {corpus['vocabulary']:,} distinct words"
    segmenter = f" Word segmentation by {escape(corpus['segmenter'])}." if corpus["segmenter"] else ""
    bars = [
        (f"into {pair['target']}" if "target" in pair else "all", (pair["coverage"], pair["vocabulary_coverage"]))
        for pair in _totals_and_pairs(corpus)
    ]
    ranks = [(f"words {band['from']:,}–{band['to']:,}", (band["known"],)) for band in corpus["by_rank"]]
    parts = [
        f"<h2>{escape(corpus['prefix'])} ({escape(corpus['language'])})</h2>",
        f"<p>{words}, in {corpus['tokens']:,} tokens.{segmenter}</p>",
        _chart(
            "Coverage",
            _bars(bars),
            "Percentage of the running words (upper bar) and of the vocabulary (lower bar) covered by the table.",
        ),
        _chart(
            "Coverage by frequency",
            _bars(ranks),
            "Percentage of the vocabulary covered by the table, by frequency rank in this corpus.",
        ),
        *(_ambiguity(pair) for pair in corpus["pairs"] if pair["known_words"]),
        _frequent(corpus["frequent_words"]),
        _unknown(corpus["unknown_words"]),
        _samples(corpus["samples"]),
    ]
    return "\n".join(part for part in parts if part)


def _ambiguity(pair: Mapping[str, Any]) -> str:
    counts = pair["words_by_translations"]
    last = max((number for number, count in enumerate(counts) if count), default=0)
    rows = [
        (f"{number + 1}{'+' if number + 1 == len(counts) else ''}", (count / pair["known_words"],))
        for number, count in enumerate(counts[: last + 1])
    ]
    return _chart(
        f"Translations into {escape(pair['target'])}",
        _bars(rows),
        "Percentage of the known running words by number of translations.",
    )


def _frequent(words: Sequence[Mapping[str, Any]]) -> str:
    if not words:
        return ""
    rows = [
        [
            f"<bdi>{_plain(each['word'])}</bdi>",
            ", ".join(_translation(one) for one in each["translations"][:_MOST_TRANSLATIONS]),
            f"{each['count']:,}",
            _percent(each["share"], 2),
            _percent(each["share_of_known"], 2),
        ]
        for each in words
    ]
    header = ["word", "translations and their probability", "count", "of all words", "of known words"]
    note = (
        "Check these first: they are most of what code-switching writes. A wrong translation here is seen most often."
    )
    return f'<h3>Most frequent switched words</h3>\n<p class="note">{note}</p>\n' + page.table(header, rows, text=True)


def _translation(each: Mapping[str, Any]) -> str:
    return f"<bdi>{_plain(each['text'])}</bdi><sub>{escape(each['target'])}</sub> {each['probability']:.0%}"


def _unknown(words: Sequence[Mapping[str, Any]]) -> str:
    if not words:
        return ""
    items = "".join(f"<li><bdi>{escape(each['word'])}</bdi> <span>{each['count']:,}</span></li>" for each in words)
    return f'<h3>Most frequent unknown words</h3>\n<ol class="words">{items}</ol>'


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    if not samples:
        return ""
    items = "\n".join(
        f'<li dir="auto">{_plain(each["before"])}{each["space"]}<del><bdi>{_plain(each["original"])}</bdi></del> '
        f"<ins><bdi>{_plain(each['switched'])}</bdi></ins><sub>{escape(each['target'])}</sub>{_plain(each['after'])}</li>"
        for each in samples
    )
    return (
        '<h3>Switched words</h3>\n<p class="note">Known words sampled evenly over the corpus, each with a translation '
        f'drawn as in training.</p>\n<ul class="samples">\n{items}\n</ul>'
    )


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    if not sources:
        return ""
    rows = [
        [
            escape(str(source.get("path", ""))),
            escape(str(source.get("languages", ""))),
            escape(str(source.get("format", ""))),
            f"{source.get('pairs', 0):,}",
            escape(str(source.get("title", ""))),
            escape(str(source.get("licence", "")) or "unknown"),
        ]
        for source in sources
    ]
    return "<h3>Word lists</h3>\n" + page.table(
        ["file", "languages", "format", "pairs", "title", "licence"], rows, text=True
    )


def _rules(build: Mapping[str, Any]) -> str:
    rules = build.get("rules", {})
    if not rules:
        return ""
    rows = [[escape(name), f"{count:,}"] for name, count in rules.items()]
    rows.append(["lines skipped", f"{build.get('lines_skipped', 0):,}"])
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in build.get("settings", {}).items())
    note = f'<p class="note">{escape(settings)}</p>' if settings else ""
    return f"<h3>Build statistics</h3>\n{note}\n" + page.table(["rule", "count"], rows)


def _chart(title: str, svg: str, caption: str) -> str:
    return page.figure(title, svg, caption, level=3, narrow=True)


def _bars(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Horizontal bars from 0 to 1; every row has one value, or every row has two."""
    thin = _BAR_HEIGHT / 2
    lines = []
    for number, (label, values) in enumerate(rows):
        top = number * _ROW_HEIGHT + (_ROW_HEIGHT - _BAR_HEIGHT) / 2
        width = _WIDTH - _LABEL_WIDTH - _VALUE_WIDTH * len(values)
        middle = top + _BAR_HEIGHT - 2
        lines.append(f'<text x="0" y="{middle:g}">{escape(shorten(label, _MAX_LABEL_LENGTH))}</text>')
        lines.append(
            f'<rect class="track" x="{_LABEL_WIDTH}" y="{top:g}" width="{width}" height="{_BAR_HEIGHT}" rx="2"/>'
        )
        height = _BAR_HEIGHT if len(values) == 1 else thin - 1
        for index, (value, kind) in enumerate(zip(values, ("first", "second"), strict=False)):
            y = top + index * (thin + 1)
            lines.append(
                f'<rect class="{kind}" x="{_LABEL_WIDTH}" y="{y:g}" width="{width * value:.1f}" height="{height:g}"/>'
            )
            x = _WIDTH - _VALUE_WIDTH * (len(values) - 1 - index)
            lines.append(f'<text class="muted" x="{x}" y="{middle:g}" text-anchor="end">{value:.1%}</text>')
    return f'<svg role="img" viewBox="0 0 {_WIDTH} {len(rows) * _ROW_HEIGHT}">{"".join(lines)}</svg>'


def _plain(text: str) -> str:
    """Returns escaped text on one line, with non-printable characters replaced by spaces."""
    return escape("".join(character if character.isprintable() else " " for character in text))


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _change(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{before:.2f} → {after:.2f}"

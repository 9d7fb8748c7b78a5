"""Renders a preview as one HTML page without external resources or scripts."""

from collections.abc import Mapping
from html import escape

from megatron_prealign import page
from megatron_prealign.code_switch.preview import Part, Preview, PreviewSample
from megatron_prealign.code_switch.preview_text import caption, split_space, totals_table, visible

# hues of the target languages, in the order of the table
_HUES = (150, 265, 25, 205, 325, 85, 60, 235)

_STYLE = """
body { max-width: 84rem }
td.text:last-child { color: var(--muted) } td.text:nth-child(2) { text-align: right; white-space: nowrap;
  min-width: 0 }
figure { margin: 1.25rem 0 }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .35rem }
@media (max-width: 50rem) { .sides { grid-template-columns: 1fr } }
.sides div { background: var(--panel); padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap }
mark { color: hsl(var(--hue) 70% var(--text)); background: hsl(var(--hue) 60% var(--mark)); border-radius: 3px;
  padding: .05em .2em; font-weight: 600; cursor: help }
sub { line-height: 0; margin-left: .15em }
"""
_LIGHTNESS = {"--mark": ("90%", "22%"), "--text": ("24%", "82%")}


def render_page(preview: Preview) -> str:
    """HTML text of the page."""
    hues = {language: _HUES[index % len(_HUES)] for index, language in enumerate(preview.ratios)}
    totals = [[escape(cell) for cell in line] for line in totals_table(preview)]
    samples = "\n".join(_sample(sample, number, hues) for number, sample in enumerate(preview.samples, start=1))
    body = (
        "<h1>Code-switching preview</h1>\n"
        "<p>First: text of the dataset. Second: model input. Hover over a coloured word to see its counterpart. "
        "The labels depend on the label mode; with input_only they are the text of the dataset.</p>\n"
        f"<h2>Totals</h2>\n{page.table([], totals, text=True)}\n<h2>Samples</h2>\n{samples}"
    )
    return page.render("Code-switching preview", body, style=_STYLE, colours=_LIGHTNESS)


def _sample(sample: PreviewSample, number: int, hues: Mapping[str, int]) -> str:
    original = "".join(_text(part, part.source, hues, with_language=False) for part in sample.parts)
    result = "".join(_text(part, part.output, hues, with_language=True) for part in sample.parts)
    return (
        f"<figure><figcaption>{escape(caption(sample, number))}</figcaption>\n"
        f'<div class="sides"><div dir="auto">{original}</div><div dir="auto">{result}</div></div></figure>'
    )


def _text(part: Part, text: str, hues: Mapping[str, int], *, with_language: bool) -> str:
    if part.language is None:
        return _plain(text)
    space, word = split_space(text)
    tip = f"{split_space(part.source)[1]} → {split_space(part.output)[1]} ({part.language})"
    note = f"<sub>{escape(part.language)}</sub>" if with_language else ""
    # <bdi>, or a right-to-left word would reorder the punctuation next to it
    return (
        f'{_plain(space)}<mark style="--hue: {hues[part.language]}" title="{escape(visible(tip))}">'
        f"<bdi>{_plain(word)}</bdi></mark>{note}"
    )


def _plain(text: str) -> str:
    """Escapes text for the page; keeps line breaks and makes other control characters visible."""
    return escape("\n".join(visible(line) for line in text.split("\n")))

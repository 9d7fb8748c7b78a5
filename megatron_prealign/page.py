"""Self-contained HTML pages without scripts: the layout, colours, tables and figures of all reports."""

import base64
import struct
from collections.abc import Mapping, Sequence
from html import escape

INK, MUTED, GRID = ("#1f2328", "#e6e9ed"), ("#5b6470", "#9aa5b1"), ("#d8dee4", "#2d343d")
"""Colours of text, secondary text and lines, each as (light mode, dark mode)."""

_COLOURS = {
    "--ground": ("#ffffff", "#0f1318"),
    "--panel": ("#f6f8fa", "#171c23"),
    "--ink": INK,
    "--muted": MUTED,
    "--grid": GRID,
}
_STYLE = """
:root { --font: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 68rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 var(--font); overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem }
p { max-width: 46rem; margin: .5rem 0 } .lead { font-size: 1.08rem }
.note, figcaption { color: var(--muted); font-size: .9rem } figcaption { max-width: 46rem }
.scroll { overflow-x: auto } img { display: block; background: #ffffff }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .8rem .4rem 0; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: top;
  white-space: nowrap }
th { font-weight: 600; color: var(--muted); white-space: normal; overflow-wrap: break-word;
  vertical-align: bottom }
th:first-child, td:first-child, th.text, td.text { text-align: left; white-space: normal; min-width: 7rem }
figure { margin: 1.25rem 0 2rem } svg { display: block; width: 100%; height: auto; min-width: 52rem }
figure.narrow svg { min-width: 40rem; max-width: 46rem }
sub { color: var(--muted); font-size: max(.7em, 11px) }
dt { font-weight: 600; margin-top: .7rem } dd { margin: 0; max-width: 46rem }
""".strip()


def render(
    title: str,
    body: str,
    *,
    style: str = "",
    colours: Mapping[str, tuple[str, str]] | None = None,
    images: bool = False,
) -> str:
    """Renders a complete HTML page.

    Args:
        title: Window title, plain text.
        body: HTML.
        style: CSS in addition to the common style.
        colours: CSS variable -> (light mode, dark mode), in addition to the common colours.
        images: Whether the body contains `image`; otherwise the page forbids all images.
    """
    policy = f"default-src 'none'; style-src 'unsafe-inline'{'; img-src data:' if images else ''}"
    variables = {**_COLOURS, **(colours or {})}
    light, dark = ("; ".join(f"{name}: {pair[mode]}" for name, pair in variables.items()) for mode in (0, 1))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n"
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"{_STYLE}\n{style.strip()}\n</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """Renders a table that scrolls horizontally on narrow screens.

    Args:
        header: Column titles, plain text; empty for no header.
        rows: Cells, HTML.
        text: Whether the cells contain text, which is wrapped, instead of numbers.
    """
    kind = ' class="text"' if text else ""
    cells = "".join(f"<th{kind}>{escape(name)}</th>" for name in header)
    head = f"<thead><tr>{cells}</tr></thead>\n" if header else ""
    body = "\n".join("<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n{head}<tbody>\n{body}\n</tbody></table></div>'


def figure(title: str, svg: str, caption: str, *, level: int, narrow: bool = False) -> str:
    """Renders a plot with title and caption; on narrow screens it scrolls instead of shrinking its text.

    Args:
        title: Text without HTML markup.
        svg: One `<svg>` element.
        caption: HTML.
        level: Heading level of the title: 2 for h2.
        narrow: Whether to limit the plot to the width of text.
    """
    kind = ' class="narrow"' if narrow else ""
    labelled = svg.replace("<svg ", f'<svg aria-label="{title}" ', 1)
    plot = f'<div class="scroll">{labelled}</div>'
    return f"<h{level}>{title}</h{level}>\n<figure{kind}>\n{plot}\n<figcaption>{caption}</figcaption>\n</figure>"


def image(title: str, png: bytes, caption: str, *, level: int, dpi: int) -> str:
    """Renders a PNG inside the page, with title and caption, in the size of its text; narrow screens scroll.

    Args:
        title: Plain text.
        png: Content of the file.
        caption: HTML.
        level: Heading level of the title: 2 for h2.
        dpi: Resolution that the image was drawn with.
    """
    # Width and height are in the first chunk of every PNG. A pixel of CSS is 1/96 inch.
    width, height = (round(pixels * 96 / dpi) for pixels in struct.unpack(">II", png[16:24]))
    name, data = escape(title), base64.b64encode(png).decode("ascii")
    size = f'width="{width}" height="{height}"'
    plot = f'<img role="img" alt="{name}" aria-label="{name}" {size} src="data:image/png;base64,{data}">'
    return (
        f'<h{level}>{name}</h{level}>\n<figure>\n<div class="scroll">{plot}</div>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )


def definitions(items: Mapping[str, str]) -> str:
    """Renders terms and their definitions, both plain text."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in items.items()) + "</dl>"


def decimal(value: float | None, digits: int = 2) -> str:
    """Formats a number; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"

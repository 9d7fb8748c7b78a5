"""Draws the figures of the report with matplotlib, without a display and without pyplot's global state."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

from megatron_prealign import page
from megatron_prealign.evaluation.run_record import ALIGNMENT, Measurement, RunRecord
from megatron_prealign.text import shorten

Runs = Mapping[str, tuple[RunRecord, Measurement]]
# [(tokens, one value per layer)]
LayerCurve = Sequence[tuple[int, Sequence[float]]]

INK, MUTED, GRID = page.INK[0], page.MUTED[0], page.GRID[0]
# One colour per run, distinguishable with colour blindness; dark mode uses the colour at the same index.
RUN_COLOURS = ("#0072b2", "#d55e00", "#00835f", "#b8578a", "#8c6d1f", "#3b97cb", "#6a3d9a", "#707070")
RUN_COLOURS_DARK = ("#58a6e0", "#ff8c42", "#3fca9b", "#e59ac5", "#d6b656", "#8fd0f5", "#b08ce0", "#a8a8a8")
# First to last layer: ten steps of the part of matplotlib's plasma whose contrast with the ground is at least 3:1.
LAYER_COLOURS = (
    *("#20068f", "#3f049c", "#5c01a6", "#7701a8", "#8f0da4"),
    *("#a62098", "#bb3488", "#cc4778", "#da5b69", "#e76f5a"),
)
LAYER_COLOURS_DARK = (
    *("#ac2694", "#be3885", "#ce4b75", "#dd5e66", "#e97158"),
    *("#f3874a", "#fa9e3b", "#fdb52e", "#fcd025", "#f4ed27"),
)
# Of sentences; wider than the line that marks the end of alignment.
_DOTTED = (0, (1, 1.6))
PNG_DPI = 144
MAX_POINTS = 400
MAX_COLUMNS = 2
MAX_LAYER_LABELS = 8
# Longer names of runs and languages would run over the next panel.
MAX_TITLE_LENGTH, MAX_LEGEND_LENGTH = 34, 40


def mean_over_pairs(by_pair: Mapping[str, Sequence[float]]) -> list[float]:
    """Mean P@1 over language pairs, per layer; empty without pairs."""
    return [sum(layer) / len(layer) for layer in zip(*by_pair.values(), strict=True)]


def layer_names(count: int) -> list[str]:
    """Names of `count` layers: embedding output, blocks 1 to count - 2, output embedding."""
    return ["emb", *(str(block) for block in range(1, count - 1)), "out"][:count]


def short_count(value: float, _position: object = None) -> str:
    """Formats a count with a unit: 1.6M for 1600000."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:g}"


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Averages neighbouring points to at most `limit` points; drops points that are not finite."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    width = math.ceil(len(finite) / limit) if finite else 1
    buckets = [finite[start : start + width] for start in range(0, len(finite), width)]
    return [(bucket[-1][0], sum(y for _, y in bucket) / len(bucket)) for bucket in buckets]


@contextmanager
def plot_style() -> Iterator[None]:
    """Settings of all figures, inside the `with` block."""
    import matplotlib

    settings = {
        # Keep text as text: smaller files, the viewer's fonts, and run names in any script.
        "svg.fonttype": "none",
        "svg.hashsalt": "megatron-prealign",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 4,
        "grid.linewidth": 0.7,
        # A dollar sign in the name of a run must not start math mode.
        "text.parse_math": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), MUTED),
        "grid.color": GRID,
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(
    panels: int, *, columns: int = MAX_COLUMNS, panel_width: float = 4.4, height: float = 3.2
) -> tuple[Any, list[Any]]:
    """Returns a figure and the axes of its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(max(panel_width * columns, 6.0), height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, axes[:panels]


def run_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns colour and marker of each run."""
    styles = {}
    for index, name in enumerate(names):
        turn, colour = divmod(index, len(RUN_COLOURS))
        styles[name] = {"color": RUN_COLOURS[colour], "marker": "os^D"[turn % 4]}
    return styles


def add_legend(figure: Any, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds a legend above the panels: label -> style of its line."""
    from matplotlib.lines import Line2D

    # matplotlib hides labels that start with an underscore.
    labels = [shorten(f" {label}" if label.startswith("_") else label, MAX_LEGEND_LENGTH) for label in entries]
    handles = [Line2D([], [], **style) for style in entries.values()]
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 11 / (6 + max(map(len, labels), default=1)))))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=9)


def _alignment_ends(axis: Any, runs: Runs, styles: Mapping[str, Mapping[str, Any]]) -> bool:
    found = False
    for name, (record, _) in runs.items():
        if record.alignment_end_tokens:
            axis.axvline(record.alignment_end_tokens, color=styles[name]["color"], linestyle=":", linewidth=1.0)
            found = True
    return found


def tokens_axis(axis: Any) -> None:
    """Labels an x axis of tokens."""
    axis.xaxis.set_major_formatter(short_count)
    axis.set_xlabel("tokens seen")
    axis.set_xlim(left=0)


def fit_late_values(axis: Any, curves: Sequence[Sequence[tuple[float, float]]], *, after: float = 0.1) -> None:
    """Fits the y range to the values after a fraction of the x axis: high initial values would flatten the rest."""
    end = max((x for curve in curves for x, _ in curve), default=0.0)
    late = [y for curve in curves for x, y in curve if x >= after * end]
    if len(late) > 1 and max(late) > min(late):
        margin = 0.06 * (max(late) - min(late))
        axis.set_ylim(min(late) - margin, max(late) + margin)


def _loss_points(record: RunRecord, measurement: Measurement, language: str) -> list[tuple[float, float]]:
    points = {point.tokens: point.validation_loss.get(language, math.nan) for point in record.evaluations}
    points[measurement.tokens] = measurement.validation_loss.get(language, math.nan)
    return thin(sorted(points.items()))


def _draw_loss_panels(axes: Sequence[Any], runs: Runs, languages: Sequence[str]) -> bool:
    styles = run_styles(list(runs))
    aligned = False
    for axis, language in zip(axes, languages, strict=True):
        curves = [_loss_points(record, measurement, language) for record, measurement in runs.values()]
        for name, curve in zip(runs, curves, strict=True):
            if curve:
                axis.plot(*zip(*curve, strict=True), **styles[name])
        fit_late_values(axis, curves)
        aligned = _alignment_ends(axis, runs, styles) or aligned
        axis.set_title(shorten(f"Validation loss: {language}", MAX_TITLE_LENGTH))
        axis.set_ylabel("nats per token")
        tokens_axis(axis)
    return aligned


def _draw_by_layer(axis: Any, runs: Runs) -> dict[str, Any]:
    """Returns the legend entries of the lines that are not of trained words."""
    styles = run_styles(list(runs))
    depth, entries = 0, {}
    for name, (_, measurement) in runs.items():
        for by_pair, label, line in (
            (measurement.word_retrieval_p_at_1, None, {}),
            (measurement.word_retrieval_p_at_1_held_out, "held-out words", {"linestyle": "--", "marker": ""}),
            (measurement.sentence_retrieval_p_at_1, "sentences", {"linestyle": _DOTTED, "marker": ""}),
        ):
            p_at_1 = mean_over_pairs(by_pair)
            if p_at_1:
                axis.plot(range(len(p_at_1)), p_at_1, **{**styles[name], **line})
                depth = max(depth, len(p_at_1))
                if label is not None:
                    entries[label] = {"color": MUTED, "linestyle": line["linestyle"]}
    names = layer_names(depth)
    step = math.ceil(depth / 14)
    ticks = sorted({*range(0, depth - 1, step), depth - 1})
    axis.set_xticks(ticks, [names[tick] for tick in ticks])
    axis.set_xlabel("layer")
    axis.set_ylabel("P@1")
    axis.set_ylim(-0.03, 1.03)
    axis.set_title("Retrieval by layer" if "sentences" in entries else "Word retrieval by layer")
    return entries


def _entries(
    runs: Runs, by_layer: Mapping[str, Any] | None = None, *, aligned: bool = False, others: bool = False
) -> dict[str, dict[str, Any]]:
    """Legend entries.

    Args:
        by_layer: Result of `_draw_by_layer`.
    """
    entries = run_styles(list(runs))
    if aligned:
        entries["end of alignment"] = {"color": MUTED, "linestyle": ":", "linewidth": 1.0}
    entries.update(by_layer or {})
    if others:
        entries["other word pairs"] = {"color": MUTED, "linestyle": "-."}
    return entries


def _languages(runs: Runs) -> list[str]:
    return list(dict.fromkeys(language for _, measurement in runs.values() for language in measurement.validation_loss))


def _has_retrieval(runs: Runs) -> bool:
    return any(each.word_retrieval_p_at_1 or each.sentence_retrieval_p_at_1 for _, each in runs.values())


def draw_main(runs: Runs) -> Any | None:
    """Draws validation loss per language, P@1 by layer and the alignment watch in one figure; None without data."""
    languages = _languages(runs)
    watched = bool(_watched(runs))
    panels = len(languages) + _has_retrieval(runs) + 2 * watched
    if not panels:
        return None
    with plot_style():
        figure, axes = new_figure(panels, columns=3)
        aligned = _draw_loss_panels(axes[: len(languages)], runs, languages)
        by_layer = _draw_by_layer(axes[len(languages)], runs) if _has_retrieval(runs) else {}
        if watched:
            aligned = _draw_watch_panels(axes[-2], axes[-1], runs) or aligned
        add_legend(figure, _entries(runs, by_layer, aligned=aligned, others=watched))
    return figure


def draw_validation_loss(runs: Runs) -> Any | None:
    """Draws validation loss over tokens, one panel per language, one line per run; None without evaluations."""
    languages = _languages(runs)
    if not languages:
        return None
    with plot_style():
        figure, axes = new_figure(len(languages))
        aligned = _draw_loss_panels(axes, runs, languages)
        add_legend(figure, _entries(runs, aligned=aligned))
    return figure


def draw_by_layer(runs: Runs) -> Any | None:
    """Draws P@1 by layer at the end of training, one line per run, dashed for held-out words and dotted for sentences;
    None without data."""
    if not _has_retrieval(runs):
        return None
    with plot_style():
        figure, (axis,) = new_figure(1, panel_width=7.5)
        by_layer = _draw_by_layer(axis, runs)
        add_legend(figure, _entries(runs, by_layer))
    return figure


def draw_retrieval_over_tokens(runs: Runs) -> Any | None:
    """Draws P@1 over tokens, one panel per run, one line per layer; None without data."""
    curves: dict[str, LayerCurve] = {}
    for name, (record, measurement) in runs.items():
        points = {point.tokens: mean_over_pairs(point.word_retrieval_p_at_1) for point in record.evaluations}
        points[measurement.tokens] = mean_over_pairs(measurement.word_retrieval_p_at_1)
        measured = [(tokens, layers) for tokens, layers in sorted(points.items()) if layers]
        if measured:
            curves[name] = measured
    if not curves:
        return None
    with plot_style():
        figure, axes = new_figure(len(curves))
        depth = _depth(curves.values())
        for axis, (name, curve) in zip(axes, curves.items(), strict=True):
            _draw_layers(axis, curve, depth, runs[name][0].alignment_end_tokens)
            axis.set_title(shorten(name, MAX_TITLE_LENGTH))
            axis.set_ylabel("P@1")
            axis.set_ylim(-0.03, 1.03)
        add_legend(figure, _layer_entries(depth))
    return figure


def _depth(curves: Iterable[LayerCurve]) -> int:
    return max(len(layers) for curve in curves for _, layers in curve)


def _layer_colour(layer: int, depth: int) -> str:
    return LAYER_COLOURS[round(layer * 9 / max(depth - 1, 1))]


def _layer_entries(depth: int) -> dict[str, dict[str, Any]]:
    labelled = sorted({round(index * (depth - 1) / (MAX_LAYER_LABELS - 1)) for index in range(MAX_LAYER_LABELS)})
    names = layer_names(depth)
    return {f"layer {names[layer]}": {"color": _layer_colour(layer, depth)} for layer in labelled}


def _draw_layers(axis: Any, curve: LayerCurve, depth: int, alignment_end: int | None) -> None:
    """Draws one line per layer over tokens; `depth` is the number of layers of the deepest run in the figure."""
    for layer in range(depth):
        line = thin([(tokens, layers[layer]) for tokens, layers in curve if layer < len(layers)])
        if line:
            axis.plot(*zip(*line, strict=True), color=_layer_colour(layer, depth), marker="o", markersize=3)
    if alignment_end:
        axis.axvline(alignment_end, color=MUTED, linestyle=":", linewidth=1.0)
    tokens_axis(axis)


def _share_y_range(axes: Sequence[Any]) -> None:
    """Sets the same y range in all panels."""
    bounds = [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in bounds), max(high for _, high in bounds))


def _watched(runs: Runs) -> list[str]:
    """Names of the runs with measurements of the alignment watch."""
    return [name for name, (record, _) in runs.items() if record.watch]


def _watched_words(runs: Runs) -> str:
    kinds = {point.groups for record, _ in runs.values() for point in record.watch}
    return f"{kinds.pop().replace('_', '-')} words" if len(kinds) == 1 else "watched words"


def _draw_watch_panels(retrieval: Any, cosines: Any, runs: Runs) -> bool:
    """Draws P@1 in one panel and both cosines in the other; returns whether any run has an alignment phase."""
    styles = run_styles(list(runs))
    for name in _watched(runs):
        for axis, metric, line in (
            (retrieval, "p_at_1", "-"),
            (cosines, "positive_cosine", "-"),
            (cosines, "negative_cosine", "-."),
        ):
            points = thin([(point.tokens, point.mean(metric)) for point in runs[name][0].watch])
            if points:
                marker = {} if line == "-" else {"marker": ""}
                axis.plot(*zip(*points, strict=True), linestyle=line, **{**styles[name], **marker})
    aligned = [_alignment_ends(axis, runs, styles) for axis in (retrieval, cosines)]
    retrieval.set_title(f"P@1 of {_watched_words(runs)}")
    retrieval.set_ylabel("P@1, mean over layers")
    retrieval.set_ylim(-0.03, 1.03)
    cosines.set_title(f"Cosine of {_watched_words(runs)}")
    cosines.set_ylabel("cosine, mean over layers")
    for axis in (retrieval, cosines):
        tokens_axis(axis)
    return any(aligned)


def draw_watch(runs: Runs) -> Any | None:
    """Draws the alignment watch over tokens, mean over layers, one line per run; None if no run has one."""
    if not _watched(runs):
        return None
    with plot_style():
        figure, axes = new_figure(2, panel_width=5.2)
        aligned = _draw_watch_panels(axes[0], axes[1], runs)
        add_legend(figure, _entries(runs, aligned=aligned, others=True))
    return figure


def draw_watch_by_layer(runs: Runs) -> Any | None:
    """Draws the alignment watch over tokens, one row per run, one line per layer; None if no run has one."""
    watched = _watched(runs)
    if not watched:
        return None
    with plot_style():
        figure, axes = new_figure(2 * len(watched), columns=2, height=2.8)
        curves = {}
        for name in watched:
            points = runs[name][0].watch
            retrieval: LayerCurve = [(point.tokens, point.by_layer("p_at_1")) for point in points]
            margin: LayerCurve = [
                (
                    point.tokens,
                    [
                        one - other
                        for one, other in zip(
                            point.by_layer("positive_cosine"), point.by_layer("negative_cosine"), strict=True
                        )
                    ],
                )
                for point in points
            ]
            curves[name] = (retrieval, margin)
        depth = _depth(retrieval for retrieval, _ in curves.values())
        for row, (name, (retrieval, margin)) in enumerate(curves.items()):
            left, right = axes[2 * row : 2 * row + 2]
            end = runs[name][0].alignment_end_tokens
            _draw_layers(left, retrieval, depth, end)
            _draw_layers(right, margin, depth, end)
            left.set_title(shorten(name, MAX_TITLE_LENGTH))
            left.set_ylabel("P@1")
            left.set_ylim(-0.03, 1.03)
            right.set_ylabel("cosine margin over other pairs")
        _share_y_range(axes[1::2])
        add_legend(figure, _layer_entries(depth))
    return figure


def draw_training_loss(runs: Runs) -> Any | None:
    """Draws language-model loss over tokens and mean alignment loss over steps; None if nothing was logged."""
    language_model: dict[str, list[tuple[float, float]]] = {}
    alignment: dict[str, list[tuple[float, float]]] = {}
    for name, (record, _) in runs.items():
        losses: list[tuple[float, float]] = []
        contrastive: list[tuple[float, float]] = []
        for point in record.train:
            if point.lm_loss is not None:
                losses.append((point.tokens, point.lm_loss))
            elif point.phase != ALIGNMENT:
                losses.append((point.tokens, point.loss))
            # Guard steps are few and on another axis; layers that are not aligned have no loss.
            if point.phase == ALIGNMENT and (aligned := [loss for loss in point.alignment_loss if math.isfinite(loss)]):
                # Over steps, because training on words only does not advance the token count.
                contrastive.append((point.phase_step, sum(aligned) / len(aligned)))
        language_model[name], alignment[name] = thin(losses), thin(contrastive)
    panels = [curves for curves in (language_model, alignment) if any(curves.values())]
    if not panels:
        return None
    with plot_style():
        figure, axes = new_figure(len(panels), panel_width=5.2)
        styles = run_styles(list(runs))
        for axis, curves in zip(axes, panels, strict=True):
            for name, curve in curves.items():
                if curve:
                    axis.plot(*zip(*curve, strict=True), **{**styles[name], "marker": "", "linewidth": 1.4})
            if curves is language_model:
                fit_late_values(axis, list(curves.values()))
                axis.set_title("Training loss")
                tokens_axis(axis)
            else:
                axis.set_title("Alignment loss, mean over aligned layers")
                axis.set_xlabel("step of the alignment phase")
            axis.set_ylabel("nats per token" if curves is language_model else "nats per pair")
        add_legend(figure, {name: {"color": style["color"]} for name, style in styles.items()})
    return figure


def to_svg(figure: Any, prefix: str) -> str:
    """Renders the figure as an `<svg>` element to embed in a page; `prefix` makes its ids unique in the page.

    Its colours become CSS variables (`css_variables`) that follow the light or dark mode of the page.
    """
    buffer = StringIO()
    with plot_style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Only in tags and style sheets: the name of a run may look like any of these.
    text = re.sub(r"<style.*?</style>|<[^>]*>", lambda match: _embedded(match[0], prefix), text, flags=re.DOTALL)
    return re.sub(r"<svg [^>]*?viewBox", '<svg role="img" class="plot" viewBox', text, count=1)


def _embedded(tag: str, prefix: str) -> str:
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"', "", tag)
    tag = tag.replace("xlink:href=", "href=")
    tag = re.sub(r'\bid="', f'id="{prefix}-', tag)
    tag = re.sub(r'href="#', f'href="#{prefix}-', tag)
    tag = re.sub(r"url\(#", f"url(#{prefix}-", tag)
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", tag)
    for variable, (light, _) in css_variables().items():
        tag = re.sub(f"{light}(?![0-9a-f])", f"var({variable})", tag)
    return tag


def css_variables() -> dict[str, tuple[str, str]]:
    """CSS variable -> its colour in light mode and in dark mode."""
    runs = zip(RUN_COLOURS, RUN_COLOURS_DARK, strict=True)
    layers = zip(LAYER_COLOURS, LAYER_COLOURS_DARK, strict=True)
    return {
        "--ink": page.INK,
        "--muted": page.MUTED,
        "--grid": page.GRID,
        **{f"--run-{index}": pair for index, pair in enumerate(runs)},
        **{f"--layer-{index}": pair for index, pair in enumerate(layers)},
    }


def save_png(figure: Any, path: Path | BinaryIO) -> None:
    """Writes the figure as PNG on a white background, wide enough for a README."""
    with plot_style():
        figure.savefig(path, format="png", dpi=PNG_DPI, facecolor="white")

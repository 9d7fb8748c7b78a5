"""Trade-off of a study: loss of the target languages against word retrieval, a labelled marker per run."""

from collections.abc import Sequence
from typing import Any

from megatron_prealign.evaluation.plots import INK, MAX_TITLE_LENGTH, MUTED, new_figure, plot_style
from megatron_prealign.study.curves import run_styles
from megatron_prealign.study.definition import Study
from megatron_prealign.study.results import LOSS, P_AT_1, Row, Spread, by_seed, mean_over_names, names_of, spread
from megatron_prealign.text import shorten

_LABEL_LENGTH = 28
_ANGLES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_DISTANCES = (8, 16, 28, 44, 64, 88)
"""Points between a marker and its label: the first place without an overlap is taken."""


def target_pairs(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Language with a loss -> the language pairs into it, for languages that have some."""
    found = {
        language: [pair for pair in names_of(rows, P_AT_1) if pair.endswith(f"-{language}")]
        for language in names_of(rows, LOSS)
    }
    return {language: pairs for language, pairs in found.items() if pairs}


def draw_trade_off(study: Study, rows: Sequence[Row]) -> Any | None:
    """Draws a panel per target language, with bars of one standard deviation over seeds; None without P@1."""
    panels = {language: _points(study, rows, language, pairs) for language, pairs in target_pairs(rows).items()}
    panels = {language: points for language, points in panels.items() if points}
    if not panels:
        return None
    styles = run_styles([run.name for run in study.runs])
    with plot_style():
        figure, axes = new_figure(len(panels), panel_width=5.2 if len(panels) > 1 else 8.0, height=4.6)
        for axis, (language, points) in zip(axes, panels.items(), strict=True):
            for name, (x, y) in points.items():
                bars = [each.deviation if each.seeds > 1 else 0.0 for each in (x, y)]
                style = {**styles[name], "linestyle": "none", "markersize": 7}
                axis.errorbar(x.mean, y.mean, xerr=bars[0], yerr=bars[1], elinewidth=0.9, capsize=2, **style)
            axis.set_title(shorten(f"Trade-off: {language}", MAX_TITLE_LENGTH))
            axis.set_xlabel("P@1 of trained words, mean over layers")
            axis.set_ylabel(shorten(f"validation loss {language}, nats per token", 48))
            axis.margins(0.12)
        # The layout moves the axes; labels are placed on what it made.
        figure.canvas.draw()
        figure.set_layout_engine("none")
        for axis, points in zip(axes, panels.values(), strict=True):
            _label(axis, points)
    return figure


def _points(study: Study, rows: Sequence[Row], language: str, pairs: Sequence[str]) -> dict[str, tuple[Spread, Spread]]:
    """Run -> P@1 and loss."""
    losses, retrieval = by_seed(rows, LOSS), mean_over_names(rows, P_AT_1, pairs)
    return {
        run.name: (spread(list(found.values())), spread(list(losses[run.name, language].values())))
        for run in study.runs
        if (found := retrieval.get(run.name)) and (run.name, language) in losses
    }


def _label(axis: Any, points: dict[str, tuple[Spread, Spread]]) -> None:
    """Writes the names next to the points, without overlaps as far as possible; distant ones have a line."""
    taken = [box for x, y in points.values() for box in _marker_boxes(axis, x, y)]
    frame = axis.get_window_extent()
    for name, (x, y) in points.items():
        best: tuple[int, Any] | None = None
        for distance in _DISTANCES:
            for across, up in _ANGLES:
                label = axis.annotate(
                    shorten(name, _LABEL_LENGTH),
                    (x.mean, y.mean),
                    xytext=(across * distance, up * distance),
                    textcoords="offset points",
                    ha=("right", "center", "left")[across + 1],
                    va=("top", "center", "bottom")[up + 1],
                    fontsize=8.5,
                    color=INK,
                    arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6} if distance > 8 else None,
                )
                box = _text_box(label)
                overlaps = sum(box.overlaps(other) for other in taken)
                overlaps += 10 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
                if best is None or overlaps < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = (overlaps, label)
                else:
                    label.remove()
                if overlaps == 0:
                    break
            if best is not None and best[0] == 0:
                break
        assert best is not None
        taken.append(_text_box(best[1]))


def _marker_boxes(axis: Any, x: Spread, y: Spread) -> list[Any]:
    """Boxes of a marker and its two bars, in pixels."""
    from matplotlib.transforms import Bbox

    # In points: half of the marker, and of the caps.
    half = 5 * axis.figure.dpi / 72
    across, up = (each.deviation if each.seeds > 1 else 0.0 for each in (x, y))
    boxes = []
    for dx, dy in ((across, 0.0), (0.0, up)):
        ends = axis.transData.transform([(x.mean - dx, y.mean - dy), (x.mean + dx, y.mean + dy)])
        boxes.append(Bbox([ends[0] - half, ends[1] + half]))
    return boxes


def _text_box(label: Any) -> Any:
    """Box of an annotation without its line."""
    from matplotlib.text import Text

    # Moves the text to its place; its own result includes the line.
    label.get_window_extent()
    return Text.get_window_extent(label)

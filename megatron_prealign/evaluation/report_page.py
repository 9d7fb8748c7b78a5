"""Renders the report as one self-contained HTML file."""

import json
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from megatron_prealign import page
from megatron_prealign.evaluation.plots import css_variables, layer_names, short_count
from megatron_prealign.evaluation.retrieval_metrics import mean
from megatron_prealign.evaluation.word_classes import CLASS_TEXTS, CLASSES, share_text
from megatron_prealign.text import duration

CAPTIONS = {
    "validation-loss": (
        "Validation loss during training",
        "Loss on held-out text of each language. The y range is fitted to the values after the first tenth of the "
        "tokens; dotted lines mark the end of alignment phases.",
    ),
    "by-layer": (
        "Retrieval by layer, end of training",
        "Fraction of words whose nearest neighbour in the other language is a translation. Dashed: held-out words. "
        "Dotted: sentences of parallel text.",
    ),
    "over-tokens": (
        "Word retrieval during training",
        "One panel per run, one line per layer; dotted lines mark the end of the alignment phase.",
    ),
    "watch": (
        "Alignment during training",
        "Alignment watch, averaged over layers and both directions of every language pair. Left: fraction of words "
        "whose nearest neighbour by cosine is a translation. Right: mean cosine of translations (solid) and of all "
        "other word pairs (dash-dotted). Dotted lines mark the end of alignment phases.",
    ),
    "watch-layers": (
        "Alignment during training, by layer",
        "One row per run, one line per layer. Left: P@1. Right: mean cosine of translations minus mean cosine of other "
        "word pairs. Dotted lines mark the end of the alignment phase.",
    ),
    "training-loss": (
        "Training loss",
        "Loss on training batches, averaged over neighbouring steps. Code-switching makes these batches harder to "
        "predict, so compare models by validation loss.",
    ),
}

_STYLE = """
table { width: 100% }
td.text { font-family: ui-monospace, monospace; font-size: .85rem }
.good { color: var(--good) } .bad { color: var(--bad) }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }
details { border-top: 1px solid var(--grid); padding: .6rem 0 } summary { cursor: pointer; font-weight: 600 }
pre { background: var(--panel); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .82rem;
  line-height: 1.45 }
"""
_DIFFERENCE_COLOURS = {"--good": ("#00724d", "#4fd1a5"), "--bad": ("#b3261e", "#ff8a80")}


def render_page(report: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """Renders a report of `build_report` as HTML, with `figures`: key of `CAPTIONS` -> `<svg>` element."""
    parts = [
        "<h1>Training report</h1>",
        _lead(report),
        "<h2>Runs</h2>",
        _runs_table(report["runs"]),
        _differences_table(report),
        _word_classes_table(report),
        *(_figure(name, svg) for name, svg in figures.items()),
        _watch_table(report["runs"]),
        _layers_table(report["runs"]),
        _pairs_table(report["runs"], "word_retrieval_p_at_1", ""),
        _pairs_table(report["runs"], "sentence_retrieval_p_at_1", " of sentences"),
        _recipe_differences_table(report),
        "<h2>Definitions</h2>",
        page.definitions({name.replace("_", " "): text for name, text in report["definitions"].items()}),
        _sources(report["runs"]),
    ]
    body = "\n".join(part for part in parts if part)
    title = f"Training report: {', '.join(report['runs'])}"
    return page.render(title, body, style=_STYLE, colours={**css_variables(), **_DIFFERENCE_COLOURS})


def _lead(report: Mapping[str, Any]) -> str:
    runs, differences = report["runs"], report["differences"]
    first = next(iter(runs))
    sentences = []
    for name, change in differences.items():
        parts = [
            f"{delta:+.3f} on {escape(lang)}" for lang, delta in change["validation_loss"].items() if delta is not None
        ]
        if not parts:
            continue
        sentence = f"<b>{escape(name)}</b> vs. <b>{escape(first)}</b>: validation loss {', '.join(parts)}"
        if change["word_retrieval_p_at_1_mean"] is not None:
            p_at_1, base = (mean(runs[run]["word_retrieval_p_at_1"]) for run in (name, first))
            sentence += f"; word-retrieval P@1, mean over layers, {page.decimal(p_at_1, 2)} vs. {page.decimal(base, 2)}"
        sentences.append(f'<p class="lead">{sentence}.</p>')
    for name, run in runs.items():
        if run["shuffled_dictionary"]:
            sentences.append(
                f'<p class="lead"><b>{escape(name)}</b> is a control: every word of its dictionary has the '
                "translations of another word, so what it gains does not come from true translations.</p>"
            )
    if len(runs) == 1:
        run = runs[first]
        losses = ", ".join(
            f"{page.decimal(loss, 3)} on {escape(lang)}" for lang, loss in run["validation_loss"].items()
        )
        subject = f"<b>{escape(first)}</b> after {short_count(run['tokens'])} tokens"
        sentences.append(f'<p class="lead">{subject}: validation loss {losses or "not measured"}.</p>')
    return "\n".join(sentences)


def _runs_table(runs: Mapping[str, Any]) -> str:
    languages = list(dict.fromkeys(language for run in runs.values() for language in run["validation_loss"]))
    held_out = any(run["word_retrieval_p_at_1_held_out"] for run in runs.values())
    header = ["Run"]
    for language in languages:
        header += [f"loss {language}", f"perplexity {language}"]
    sentences = any(run["sentence_retrieval_p_at_1"] for run in runs.values())
    header += ["P@1 emb", "P@1 mean", "P@1 out", *(["P@1 held-out mean"] if held_out else [])]
    header += [*(["P@1 sentences mean"] if sentences else []), "tokens", "time"]
    rows = []
    for index, (name, run) in enumerate(runs.items()):
        cells = [_run_name(name, index)]
        for language in languages:
            loss = run["validation_loss"].get(language)
            cells += [
                page.decimal(loss, 3),
                page.decimal(math.exp(loss), 1) if loss is not None and loss < 700 else "–",
            ]
        p_at_1 = run["word_retrieval_p_at_1"]
        cells += [page.decimal(p_at_1[0] if p_at_1 else None, 2), page.decimal(mean(p_at_1), 2)]
        cells += [page.decimal(p_at_1[-1] if p_at_1 else None, 2)]
        if held_out:
            cells.append(page.decimal(mean(run["word_retrieval_p_at_1_held_out"]), 2))
        if sentences:
            cells.append(page.decimal(mean(run["sentence_retrieval_p_at_1"]), 2))
        rows.append([*cells, short_count(run["tokens"]), duration(run["seconds"])])
    return page.table(header, rows)


def _differences_table(report: Mapping[str, Any]) -> str:
    differences = report["differences"]
    if not differences:
        return ""
    names = list(report["runs"])
    languages = list(
        dict.fromkeys(language for change in differences.values() for language in change["validation_loss"])
    )
    header = ["Run"]
    for language in languages:
        header += [f"loss {language}", f"perplexity {language}"]
    header += ["P@1 mean", "tokens", "time"]
    rows = []
    for name, change in differences.items():
        cells = [_run_name(name, names.index(name))]
        for language in languages:
            delta, ratio = change["validation_loss"].get(language), change["perplexity_ratio"].get(language)
            percent = None if ratio is None else 100 * (ratio - 1)
            cells += [
                _difference(delta, 3, lower_is_better=True),
                _difference(percent, 1, lower_is_better=True, unit="%"),
            ]
        cells.append(_difference(change["word_retrieval_p_at_1_mean"], 2, lower_is_better=False))
        sign = "-" if change["tokens"] < 0 else "+"
        cells.append("0" if change["tokens"] == 0 else sign + short_count(abs(change["tokens"])))
        cells.append(("-" if change["seconds"] < 0 else "+") + duration(abs(change["seconds"])))
        rows.append(cells)
    return f"<h2>Differences from {escape(names[0])}</h2>\n{page.table(header, rows)}"


def _word_classes_table(report: Mapping[str, Any]) -> str:
    """Losses by class of word, with the differences from the first run."""
    header = ["Run", *(CLASS_TEXTS[each] for each in CLASSES), "share of the tokens"]
    rows = []
    for index, (name, run) in enumerate(report["runs"].items()):
        change = report["differences"].get(name, {}).get("validation_loss_words", {})
        for language, by_class in run["validation_loss_words"].items():
            cells = [page.decimal(by_class.get(each), 3) for each in CLASSES]
            deltas = [change.get(language, {}).get(each) for each in CLASSES]
            cells = [
                cell if delta is None else f"{cell} ({_difference(delta, 3, lower_is_better=True)})"
                for cell, delta in zip(cells, deltas, strict=True)
            ]
            shares = share_text(run["word_shares"].get(language, {}))
            rows.append([f"{_run_name(name, index)}, {escape(language)}", *cells, shares])
    if not rows:
        return ""
    against = f" (difference from {escape(next(iter(report['runs'])))})" if len(report["runs"]) > 1 else ""
    return f"<h2>Loss by class of word{against}</h2>\n{page.table(header, rows)}"


def _figure(name: str, svg: str) -> str:
    title, caption = CAPTIONS[name]
    return page.figure(title, svg, caption, level=2, narrow=name == "by-layer")


def _watch_table(runs: Mapping[str, Any]) -> str:
    """Last measurement of the alignment watch of each run."""
    metrics = ("p_at_1", "p_at_1_csls", "mrr", "mrr_csls", "positive_cosine", "negative_cosine")
    header = ["Run", "words", "P@1", "P@1 CSLS", "MRR", "MRR CSLS", "cosine, translations", "cosine, other pairs"]
    rows = []
    for index, (name, run) in enumerate(runs.items()):
        if not run["alignment_watch"]:
            continue
        last = run["alignment_watch"][-1]
        kind = last["groups"].replace("_", "-")
        for direction, by_name in last["pairs"].items():
            cells = [page.decimal(mean(by_name[metric]), 2) for metric in metrics]
            rows.append(
                [f"{_run_name(name, index)}, {escape(direction)}", f"{last['words'][direction]} {escape(kind)}", *cells]
            )
    title = "Alignment watch, end of training, mean over layers"
    return f"<h2>{title}</h2>\n{page.table(header, rows)}" if rows else ""


def _layers_table(runs: Mapping[str, Any]) -> str:
    metrics = ("word_retrieval_p_at_1", "sentence_retrieval_p_at_1")
    depth = max((len(run[metric]) for run in runs.values() for metric in metrics), default=0)
    if not depth:
        return ""
    rows = []
    for index, (name, run) in enumerate(runs.items()):
        for stage, p_at_1 in (
            ("after alignment", run["after_alignment"]),
            ("end of training", run["word_retrieval_p_at_1"]),
            ("end of training, held-out words", run["word_retrieval_p_at_1_held_out"]),
            ("end of training, sentences", run["sentence_retrieval_p_at_1"]),
        ):
            if p_at_1:
                cells = [page.decimal(value, 2) for value in p_at_1]
                rows.append([f"{_run_name(name, index)}, {stage}", *cells, *["–"] * (depth - len(p_at_1))])
    return f"<h2>P@1 by layer</h2>\n{page.table(['Run', *layer_names(depth)], rows)}"


def _pairs_table(runs: Mapping[str, Any], metric: str, what: str) -> str:
    """P@1 of each language pair; nothing for a single one."""
    pairs = list(dict.fromkeys(pair for run in runs.values() for pair in run[f"{metric}_by_pair"]))
    if len(pairs) < 2:
        return ""
    rows = [
        [
            _run_name(name, index),
            *(page.decimal(mean(run[f"{metric}_by_pair"].get(pair, [])), 2) for pair in pairs),
        ]
        for index, (name, run) in enumerate(runs.items())
    ]
    return f"<h2>P@1{what} by language pair, mean over layers</h2>\n{page.table(['Run', *pairs], rows)}"


def _recipe_differences_table(report: Mapping[str, Any]) -> str:
    names = list(report["runs"])
    if len(names) < 2:
        return ""
    if not report["recipe_differences"]:
        return "<h2>Recipe differences</h2>\n<p>The recipes of all runs are identical.</p>"
    rows = [
        [escape(key), *(f"<code>{_yaml_value(values[name])}</code>" for name in names)]
        for key, values in report["recipe_differences"].items()
    ]
    return f"<h2>Recipe differences</h2>\n{page.table(['Field', *names], rows, text=True)}"


def _sources(runs: Mapping[str, Any]) -> str:
    import yaml

    parts = ["<h2>Recipes and versions</h2>"]
    for name, run in runs.items():
        recipe = (
            yaml.safe_dump(run["recipe"], sort_keys=False, allow_unicode=True) if run["recipe"] else "no recipe.yaml\n"
        )
        versions = yaml.safe_dump(run["versions"], allow_unicode=True) if run["versions"] else "no versions.json\n"
        parts.append(
            f"<details><summary>{escape(name)}</summary>\n<pre>{escape(recipe)}</pre>\n<pre>{escape(versions)}</pre></details>"
        )
    return "\n".join(parts)


def _run_name(name: str, index: int) -> str:
    return f'<span class="key" style="background: var(--run-{index % 8})"></span>{escape(name)}'


def _difference(value: float | None, digits: int, *, lower_is_better: bool, unit: str = "") -> str:
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}{unit}"
    if float(f"{value:.{digits}f}") == 0:
        return text
    return f'<span class="{"good" if (value < 0) == lower_is_better else "bad"}">{text}</span>'


def _yaml_value(value: Any) -> str:
    return escape(json.dumps(value, ensure_ascii=False))

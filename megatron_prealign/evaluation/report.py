"""Writes evaluated runs to report.json, report.html, report.png and a table for the terminal."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_prealign.errors import UserError
from megatron_prealign.evaluation import plots
from megatron_prealign.evaluation.plots import Runs, mean_over_pairs
from megatron_prealign.evaluation.report_page import render_page
from megatron_prealign.evaluation.retrieval_metrics import mean
from megatron_prealign.evaluation.run_record import EvaluationPoint, Measurement, RunRecord
from megatron_prealign.evaluation.word_classes import CLASS_TEXTS, CLASSES, share_text
from megatron_prealign.files.atomic import write_all_atomically
from megatron_prealign.files.directories import writing
from megatron_prealign.text import align, duration

FORMAT_VERSION = 1

CONTROL = "a control with a shuffled dictionary: what it gains does not come from true translations"
DEFINITIONS = {
    "validation_loss": (
        "Mean negative log-likelihood per held-out token in nats, without code-switching; lower is better."
    ),
    "perplexity": "Exponential of the validation loss: the effective number of equally likely tokens.",
    "word_retrieval_p_at_1": (
        "Fraction of dictionary words whose nearest neighbour by cosine, among all candidate words of the other "
        "language, is a translation; 0 to 1, one value per layer, averaged over language pairs."
    ),
    "word_retrieval_p_at_1_held_out": (
        "The same for words whose dictionary entries were held out from alignment and code-switching. These words are "
        "fewer and their subwords may occur in other words, so compare runs on this metric, not the two metrics with "
        "each other."
    ),
    "after_alignment": "Word retrieval at the last evaluation of the alignment phase, before language-model training.",
    "layers": (
        "emb is the embedding output, 1 to L are the outputs of the blocks (the last one after the final norm), out is "
        "the output embedding."
    ),
    "shuffled_dictionary": "Whether the run was trained with a shuffled dictionary, as a control.",
    "tokens": "Tokens trained on, over all phases.",
    "seconds": "Wall-clock seconds of training, over all phases.",
}

WORD_CLASS_DEFINITIONS = {
    "validation_loss_words": (
        "The validation loss of the tokens of three classes: words of the dictionary, in any case (trained); words of "
        "which all entries are held out from training (held-out); all other tokens, such as punctuation and spaces. "
        "The classes depend on the text, the table and dictionary.held_out_fraction alone: only runs with the same "
        "three are measured on the same tokens."
    ),
    "word_shares": "Fraction of the tokens of each class; the validation loss is the mean weighted by it.",
}

SENTENCE_DEFINITIONS = {
    "sentence_retrieval_p_at_1": (
        "Fraction of sentences of parallel text whose nearest neighbour by cosine, among the sentences of the other "
        "language, is their translation. A sentence is the mean of its token states in context; 0 to 1, one value per "
        "layer, averaged over language pairs."
    ),
}

WATCH_DEFINITIONS = {
    "alignment_watch": (
        "Measured during training in both directions of every language pair: each word queries all words of the other "
        "language in the list. A wrong word that scores as high as the translation ranks ahead of it."
    ),
    "p_at_1": "Fraction of words whose nearest word of the other language by cosine is a translation.",
    "mrr": "Mean reciprocal rank (1 / rank) of a word's best translation, by cosine.",
    "csls": (
        "The same with cosines reduced by each word's mean cosine to its ten nearest words of the other language, to "
        "correct for hubs that are close to everything (Conneau et al. 2018)."
    ),
    "positive_cosine": "Mean cosine of a word and its translation.",
    "negative_cosine": "Mean cosine of words that are not translations of each other.",
}


def build_report(runs: Runs) -> dict[str, Any]:
    """Builds the content of report.json; values that are not finite are None.

    Raises:
        UserError: there are no runs.
    """
    if not runs:
        raise UserError("cannot write the report: got no runs; name at least one run directory")
    entries = {name: _run_entry(record, measurement) for name, (record, measurement) in runs.items()}
    last, _ = list(runs.values())[-1]
    report = {
        "format_version": FORMAT_VERSION,
        "runs": entries,
        "differences": differences(entries),
        "recipe": last.recipe,
        "recipe_differences": recipe_differences({name: record.recipe for name, (record, _) in runs.items()}),
        "versions": last.versions,
        "definitions": DEFINITIONS
        | (WORD_CLASS_DEFINITIONS if any(each.validation_loss_words for _, each in runs.values()) else {})
        | (SENTENCE_DEFINITIONS if any(each.sentence_retrieval_p_at_1 for _, each in runs.values()) else {})
        | (WATCH_DEFINITIONS if any(record.watch for record, _ in runs.values()) else {}),
    }
    # The round trip through JSON makes the result equal to the file's content and turns YAML dates into text.
    plain: dict[str, Any] = json.loads(json.dumps(_finite(report), default=str))
    return plain


def write_report(runs: dict[str, tuple[RunRecord, Measurement]], output: Path) -> dict[str, Any]:
    """Writes report.json, report.html and, if there is something to plot, report.png to the directory `output`, all or
    none.

    Args:
        runs: Name -> record of the run and measurement of its final model; the others are compared with the first.
        output: Directory of the report; created if it does not exist.

    Returns:
        The content of report.json.

    Raises:
        UserError: there are no runs, or `output` cannot be written to.
    """
    report = build_report(runs)
    figures = {
        "validation-loss": plots.draw_validation_loss(runs),
        "by-layer": plots.draw_by_layer(runs),
        "over-tokens": plots.draw_retrieval_over_tokens(runs),
        "watch": plots.draw_watch(runs),
        "watch-layers": plots.draw_watch_by_layer(runs),
        "training-loss": plots.draw_training_loss(runs),
    }
    svgs = {name: plots.to_svg(figure, name) for name, figure in figures.items() if figure is not None}
    page = render_page(report, svgs)
    main = plots.draw_main(runs)
    targets = [output / "report.json", output / "report.html", *([output / "report.png"] if main else [])]
    with writing(targets[0], "report"), write_all_atomically(targets) as temporary:
        temporary[0].write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary[1].write_text(page, encoding="utf-8")
        if main:
            plots.save_png(main, temporary[2])
    return report


def report_table(report: dict[str, Any]) -> str:
    """Formats the report as a plain-text table, one line per run, followed by the differences from the first run."""
    runs = report["runs"]
    languages = list(dict.fromkeys(language for run in runs.values() for language in run["validation_loss"]))
    header = ["run", *(f"loss {language}" for language in languages), "P@1 emb", "P@1 mean", "P@1 out"]
    held_out = any(run["word_retrieval_p_at_1_held_out"] for run in runs.values())
    sentences = any(run["sentence_retrieval_p_at_1"] for run in runs.values())
    header += [*(["held-out mean"] if held_out else []), *(["sentences mean"] if sentences else []), "tokens", "time"]
    rows = []
    for name, run in runs.items():
        p_at_1, held_out_p_at_1 = run["word_retrieval_p_at_1"], run["word_retrieval_p_at_1_held_out"]
        rows.append(
            [
                name,
                *(_decimal(run["validation_loss"].get(language), 3) for language in languages),
                _decimal(p_at_1[0] if p_at_1 else None, 2),
                _decimal(mean(p_at_1), 2),
                _decimal(p_at_1[-1] if p_at_1 else None, 2),
                *([_decimal(mean(held_out_p_at_1), 2)] if held_out else []),
                *([_decimal(mean(run["sentence_retrieval_p_at_1"]), 2)] if sentences else []),
                plots.short_count(run["tokens"]),
                duration(run["seconds"]),
            ]
        )
    lines = align([header, *rows])
    lines.insert(1, "-" * len(lines[0]))
    lines += _word_class_table(runs)
    first = next(iter(runs))
    for name, change in report["differences"].items():
        parts = [f"loss {lang} {_signed(delta, 3)}" for lang, delta in change["validation_loss"].items()]
        if change["word_retrieval_p_at_1_mean"] is not None:
            parts.append(f"P@1 mean {_signed(change['word_retrieval_p_at_1_mean'], 2)}")
        lines.append(f"{name} vs. {first}: {', '.join(parts) or 'no metric in common'}")
    lines += [f"{name}: {CONTROL}" for name, run in runs.items() if run["shuffled_dictionary"]]
    return "\n".join(lines)


def _word_class_table(runs: Mapping[str, Any]) -> list[str]:
    """Lines with the losses by class of word, one per run and language; none without them."""
    rows = [
        [
            name,
            language,
            *(_decimal(by_class.get(each), 3) for each in CLASSES),
            share_text(run["word_shares"].get(language, {})),
        ]
        for name, run in runs.items()
        for language, by_class in run["validation_loss_words"].items()
    ]
    if not rows:
        return []
    header = ["loss by class of word", "language", *(CLASS_TEXTS[each] for each in CLASSES), "share of the tokens"]
    lines = align([header, *rows])
    return ["", lines[0], "-" * len(lines[0]), *lines[1:], ""]


def differences(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Differences of every other run from the first one, for the metrics that both have.

    `perplexity_ratio` is the perplexity of the run divided by that of the first run.
    """
    names = list(entries)
    base = entries[names[0]]
    result = {}
    for name in names[1:]:
        run = entries[name]
        loss = {
            language: run["validation_loss"][language] - base["validation_loss"][language]
            for language in run["validation_loss"]
            if language in base["validation_loss"]
        }
        p_at_1, base_p_at_1 = run["word_retrieval_p_at_1"], base["word_retrieval_p_at_1"]
        own_mean, base_mean = mean(p_at_1), mean(base_p_at_1)
        result[name] = {
            "validation_loss": loss,
            "validation_loss_words": {
                language: {
                    each: value - base["validation_loss_words"][language][each]
                    for each, value in by_class.items()
                    if each in base["validation_loss_words"][language]
                }
                for language, by_class in run["validation_loss_words"].items()
                if language in base["validation_loss_words"]
            },
            "perplexity_ratio": {language: _exponential(delta) for language, delta in loss.items()},
            # A comparison per layer is meaningful only between models of the same depth.
            "word_retrieval_p_at_1": (
                [value - other for value, other in zip(p_at_1, base_p_at_1, strict=True)]
                if len(p_at_1) == len(base_p_at_1)
                else None
            ),
            "word_retrieval_p_at_1_mean": None if own_mean is None or base_mean is None else own_mean - base_mean,
            "tokens": run["tokens"] - base["tokens"],
            "seconds": run["seconds"] - base["seconds"],
        }
    return result


def recipe_differences(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Dotted recipe key -> run -> value, for the keys in which the runs differ; None if a run does not have the key."""
    flat = {name: _flatten(recipe) for name, recipe in recipes.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    result = {}
    for key in keys:
        values = {name: run.get(key) for name, run in flat.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            result[key] = values
    return result


def _run_entry(record: RunRecord, measurement: Measurement) -> dict[str, Any]:
    aligned = record.after_alignment
    return {
        "path": str(record.path),
        "validation_loss": measurement.validation_loss,
        "validation_loss_words": measurement.validation_loss_words,
        "word_shares": measurement.word_shares,
        "word_retrieval_p_at_1": mean_over_pairs(measurement.word_retrieval_p_at_1),
        "word_retrieval_p_at_1_by_pair": measurement.word_retrieval_p_at_1,
        "word_retrieval_p_at_1_held_out": mean_over_pairs(measurement.word_retrieval_p_at_1_held_out),
        "word_retrieval_p_at_1_held_out_by_pair": measurement.word_retrieval_p_at_1_held_out,
        "sentence_retrieval_p_at_1": mean_over_pairs(measurement.sentence_retrieval_p_at_1),
        "sentence_retrieval_p_at_1_by_pair": measurement.sentence_retrieval_p_at_1,
        "after_alignment": (mean_over_pairs(aligned.word_retrieval_p_at_1) or None) if aligned else None,
        "shuffled_dictionary": measurement.shuffled_dictionary,
        "tokens": measurement.tokens,
        "seconds": measurement.seconds,
        "recipe": record.recipe,
        "versions": record.versions,
        "history": [_history_entry(point) for point in record.evaluations],
        "alignment_watch": [asdict(point) for point in record.watch],
    }


def _history_entry(point: EvaluationPoint) -> dict[str, Any]:
    return {
        "phase": point.phase,
        "step": point.step,
        "tokens": point.tokens,
        "seconds": point.seconds,
        "validation_loss": point.validation_loss,
        "validation_loss_words": point.validation_loss_words,
        "word_retrieval_p_at_1": mean_over_pairs(point.word_retrieval_p_at_1),
        "word_retrieval_p_at_1_held_out": mean_over_pairs(point.word_retrieval_p_at_1_held_out),
        "sentence_retrieval_p_at_1": mean_over_pairs(point.sentence_retrieval_p_at_1),
    }


def _flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _exponential(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _decimal(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"

"""Losses by class of word in the report: report.json, the table and the page."""

import json
import math
import re
from pathlib import Path

from megatron_prealign.evaluation.report import build_report, report_table
from megatron_prealign.evaluation.report_page import render_page
from megatron_prealign.evaluation.run_record import Measurement, RunRecord, load_run

EVALUATION = {
    **{"kind": "evaluation", "phase": "language_model", "step": 1, "tokens": 1000, "seconds": 1.0},
    "validation_loss": {"en": 5.0},
}
Shares = dict[str, float]


def run_of(
    directory: Path, by_class: Shares | None = None, shares: Shares | None = None
) -> tuple[RunRecord, Measurement]:
    """A run and its measurement, with losses by class if given."""
    directory.mkdir()
    (directory / "metrics.jsonl").write_text(json.dumps(EVALUATION) + "\n")
    losses = {"validation_loss_words": {"en": by_class}, "word_shares": {"en": shares}} if by_class and shares else {}
    return load_run(directory), Measurement({"en": 5.0}, {}, {}, 1000, 1.0, **losses)


def test_losses_by_class_of_word(tmp_path: Path) -> None:
    plain = build_report({name: run_of(tmp_path / f"plain_{name}") for name in ("joint", "aligned")})
    assert "by class" not in report_table(plain) + render_page(plain, {})
    assert plain["differences"]["aligned"]["validation_loss_words"] == {}
    assert "validation_loss_words" not in plain["definitions"]
    shares = {"trained": 0.5, "held_out": 0.125, "other": 0.375}
    # A class without tokens is absent.
    joint = run_of(tmp_path / "joint", {"trained": 5.0, "held_out": 7.5, "other": 4.0}, shares)
    aligned = run_of(tmp_path / "aligned", {"trained": 4.25, "other": 4.0}, {"trained": 0.75, "other": 0.25})
    report = build_report({"joint": joint, "aligned": aligned})
    assert report["runs"]["joint"]["validation_loss_words"] == {"en": {"trained": 5.0, "held_out": 7.5, "other": 4.0}}
    assert report["runs"]["joint"]["word_shares"] == {"en": shares}
    change = report["differences"]["aligned"]["validation_loss_words"]
    assert change == {"en": {"trained": -0.75, "other": 0.0}}
    assert {"validation_loss_words", "word_shares"} <= set(report["definitions"])
    lines = [re.split(r"\s{2,}", line.strip()) for line in report_table(report).splitlines()]
    assert ["joint", "en", "5.000", "7.500", "4.000", "50.0% / 12.5% / 37.5%"] in lines
    assert ["aligned", "en", "4.250", "-", "4.000", "75.0% / 0.0% / 25.0%"] in lines
    page = render_page(report, {})
    assert "<h2>Loss by class of word (difference from joint)</h2>" in page
    assert '4.250 (<span class="good">-0.750</span>)' in page and "4.000 (+0.000)" in page


def test_losses_by_class_are_read_from_the_metrics(tmp_path: Path) -> None:
    line = {**EVALUATION, "validation_loss_words": {"en": {"trained": 5.0, "other": None}}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**EVALUATION, "step": 2}) + "\n")
    first, second = load_run(tmp_path).evaluations
    by_class = first.validation_loss_words["en"]
    assert by_class["trained"] == 5.0 and math.isnan(by_class["other"])
    assert second.validation_loss_words == {}

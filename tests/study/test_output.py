"""Files of a study's results: complete, consistent with each other, and without leftovers."""

import base64
import re
from html import escape
from pathlib import Path

import pytest
from support.messages import assert_facts, user_error
from support.study_records import evaluation, job_of, many_runs, records_of, study_of, write_metrics

from megatron_prealign.study import records as records_module
from megatron_prealign.study.definition import StudyRun
from megatron_prealign.study.output import write_results
from megatron_prealign.study.page import Origin
from megatron_prealign.study.records import read_records

ORIGIN = Origin("megatron-prealign study --config x.yaml", "x.yaml", "runs: [<b>]\n")
PLOTS = ["loss-over-tokens", "retrieval-by-layer", "sweep-guard-interval", "trade-off", "trained-and-held-out"]


def test_all_files(tmp_path: Path) -> None:
    records = many_runs(tmp_path)
    output = tmp_path / "study"
    written = write_results(records, output, ORIGIN)
    assert sorted(path.name for path in output.iterdir()) == [
        *("plots", "results.csv", "results.html", "results.md", "runs"),
    ]
    assert sorted(path.stem for path in (output / "plots").iterdir()) == PLOTS
    assert sorted(written.files) == sorted(
        path for path in output.rglob("*") if path.suffix in (".png", ".csv", ".md", ".html")
    )
    assert written.tables == (output / "results.md").read_text(encoding="utf-8")
    page = (output / "results.html").read_text(encoding="utf-8")
    inside = {base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]*)"', page)}
    assert inside == {path.read_bytes() for path in (output / "plots").iterdir()}
    for text in (ORIGIN.command, ORIGIN.path, ORIGIN.definition, *(str(job.recipe_file) for job in records.jobs)):
        assert escape(text) in page
    # Each table of results.md is in the page, with all cells.
    titles = re.findall(r"^## (.*)$", written.tables, flags=re.MULTILINE)
    assert titles == ["Runs", "Loss against alignment_switching_0", "Sweep: guard interval", "Cost"]
    assert all(f"<h2>{title}</h2>" in page for title in titles)
    cells = {
        cell.strip() for line in written.tables.splitlines() if line.startswith("| ") for cell in line[1:-1].split("|")
    }
    assert all(f">{cell}</t" in page for cell in cells - {"---"})


def test_plots_that_no_longer_belong_to_the_study_are_removed(tmp_path: Path) -> None:
    output = tmp_path / "study"
    write_results(many_runs(tmp_path), output, ORIGIN)
    (output / "results.png").touch()
    (output / "plots" / "notes.txt").touch()
    fewer = records_of(study_of(tmp_path, [StudyRun(name="a")]), {("a", 1): [evaluation(9, {"en": 1.0})]})
    write_results(fewer, output, ORIGIN)
    assert sorted(path.name for path in (output / "plots").iterdir()) == ["loss-over-tokens.png", "notes.txt"]
    assert not (output / "results.png").exists()
    (output / "plots" / "notes.txt").unlink()
    write_results(records_of(study_of(tmp_path, [StudyRun(name="a")]), {}), output, ORIGIN)
    assert not (output / "plots").exists()


def test_an_output_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "study"
    write_results(many_runs(tmp_path, 2), output, ORIGIN)
    before = {path: path.read_bytes() for path in output.glob("results.*")}
    for path in (output / "plots").iterdir():
        path.unlink()
    (output / "plots").rmdir()
    (output / "plots").touch()
    with user_error(output / "plots", "file"):
        write_results(many_runs(tmp_path, 3), output, ORIGIN)
    assert {path: path.read_bytes() for path in output.glob("results.*")} == before


def test_every_run_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path, [StudyRun(name="a"), StudyRun(name="b"), StudyRun(name="c")])
    jobs = [job_of(study, run.name, seed) for seed in study.seeds for run in study.runs]
    for job in jobs[:3]:
        write_metrics(job.directory, [evaluation(9, {"en": 1.0})] if job.run != "c" else [])
    monkeypatch.setattr(records_module, "last_step", lambda job: 0 if job.seed == 1 or job.run == "a" else None)
    monkeypatch.setattr(records_module, "read_cost", lambda job, record: records_module.Cost({}, {}))
    read: list[Path] = []
    load = records_module.load_run
    monkeypatch.setattr(records_module, "load_run", lambda path: read.append(path) or load(path))
    records = read_records(study, jobs)
    write_results(records, tmp_path / "study", ORIGIN)
    assert read == [job.directory for job in jobs[:4]]
    assert [each.job.name for each in records.complete] == ["a_seed1", "b_seed1"]
    assert records.absent["b_seed2"] == "not complete"
    assert "no evaluation" in records.absent["c_seed1"] and "does not exist" in records.absent["a_seed2"]


def test_an_earlier_evaluation_is_not_taken_for_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path, [StudyRun(name="a")])
    jobs = [job_of(study, "a", seed) for seed in study.seeds]
    points = [evaluation(tokens, {"en": 1.0}) for tokens in (10, 20)]
    write_metrics(jobs[0].directory, points)
    write_metrics(jobs[1].directory, points)
    # The machine lost its power while it wrote the last line.
    metrics = jobs[1].directory / "metrics.jsonl"
    metrics.write_text(metrics.read_text(encoding="utf-8")[:-5], encoding="utf-8")
    monkeypatch.setattr(records_module, "last_step", lambda job: points[1]["step"])
    monkeypatch.setattr(records_module, "read_cost", lambda job, record: records_module.Cost({}, {}))
    records = read_records(study, jobs)
    assert [each.job.name for each in records.complete] == ["a_seed1"]
    assert_facts(records.absent["a_seed2"], "last step, 2,", metrics)

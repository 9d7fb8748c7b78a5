"""The report: run directories to report.json, report.html, report.png and the table."""

import copy
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.messages import assert_facts, user_error

from megatron_prealign.evaluation import plots
from megatron_prealign.evaluation.report import build_report, recipe_differences, report_table, write_report
from megatron_prealign.evaluation.report_page import render_page
from megatron_prealign.evaluation.run_record import Measurement, RunRecord, load_run

TRAIN = {
    "kind": "train",
    "phase": "language_model",
    "step": 1,
    "phase_step": 1,
    "tokens": 1000,
    "seconds": 1.0,
    "loss": 5.0,
    "lm_loss": 5.0,
    "learning_rate": 1e-3,
    "grad_norm": 1.0,
    "tokens_per_second": 1000.0,
    "memory_gb": 0.5,
}
EVALUATION = {
    "kind": "evaluation",
    "phase": "language_model",
    "step": 1,
    "tokens": 1000,
    "seconds": 1.0,
    "validation_loss": {"en": 5.0, "de": 6.0},
    "word_retrieval_p_at_1": {"en-de": [0.5, 0.4, 0.3], "en-fr": [0.3, 0.2, 0.1]},
    "word_retrieval_p_at_1_held_out": {},
}
WATCH = {
    "kind": "alignment_watch",
    "phase": "alignment",
    "step": 0,
    "tokens": 0,
    "seconds": 0.0,
    "groups": "held_out",
    "words": {"en-de": 9, "de-en": 8},
    "pairs": {
        direction: {
            "p_at_1": [0.1 + more, 0.3 + more],
            "mrr": [0.5, 0.5],
            "p_at_1_csls": [0.25, 0.75],
            "mrr_csls": [0.5, 0.5],
            "positive_cosine": [0.5, 0.75],
            "negative_cosine": [0.25, 0.0],
        }
        for direction, more in (("en-de", 0.0), ("de-en", 0.2))
    },
}


def write_run(directory: Path, lines: list[dict], recipe: str = "model: {num_layers: 1}\n") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "recipe.yaml").write_text(recipe)
    (directory / "versions.json").write_text('{"torch": "2.13.0"}')
    return directory


def aligned_lines() -> list[dict]:
    """Two alignment evaluations, then two of language-model training."""
    lines: list[dict] = [WATCH]
    for step in (1, 2):
        lines.append(
            {**TRAIN, "phase": "alignment", "step": step, "phase_step": step, "tokens": 100 * step, "seconds": step}
            | {"lm_loss": None, "alignment_loss": [1.0, 2.0, 3.0]}
        )
        lines.append(
            {**EVALUATION, "phase": "alignment", "step": step, "tokens": 100 * step, "seconds": step}
            | {"word_retrieval_p_at_1": {"en-de": [0.25 * step] * 3}}
        )
        lines.append({**WATCH, "step": step, "tokens": 100 * step, "seconds": step})
    for step in (3, 4):
        lines.append({**WATCH, "phase": "language_model", "step": step, "tokens": 1000 * step, "seconds": 10 * step})
        lines.append({**TRAIN, "step": step, "tokens": 1000 * step, "seconds": 10 * step})
        lines.append({**EVALUATION, "step": step, "tokens": 1000 * step, "seconds": 10 * step})
    return lines


def last_measurement(record: RunRecord) -> Measurement:
    """The last evaluation of a run, as if the checkpoint had been measured."""
    last = record.evaluations[-1]
    return Measurement(
        validation_loss=last.validation_loss,
        word_retrieval_p_at_1=last.word_retrieval_p_at_1,
        word_retrieval_p_at_1_held_out=last.word_retrieval_p_at_1_held_out,
        tokens=last.tokens,
        seconds=last.seconds,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunRecord, Measurement]]:
    tmp_path = tmp_path_factory.mktemp("runs")
    joint = load_run(write_run(tmp_path / "joint", [TRAIN, EVALUATION, {**TRAIN, "step": 2, "tokens": 2000}]))
    aligned = load_run(
        write_run(tmp_path / "aligned", aligned_lines(), "model: {num_layers: 1}\nalignment: {lr: 0.1}\n")
    )
    better = replace(
        last_measurement(aligned),
        validation_loss={"en": 4.5, "de": 5.0},
        word_retrieval_p_at_1={"en-de": [1.0, 0.8, 0.6], "en-fr": [0.8, 0.6, 0.4]},
        word_retrieval_p_at_1_held_out={"en-de": [0.2, 0.1, 0.0]},
    )
    return {"joint": (joint, last_measurement(joint)), "aligned": (aligned, better)}


@pytest.fixture(scope="module")
def written(runs: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A report directory and the result of `write_report`; shared by tests because drawing takes a second."""
    directory = tmp_path_factory.mktemp("report") / "made" / "here"
    return directory, write_report(runs, directory)


def test_the_later_line_of_a_repeated_step_wins(tmp_path: Path) -> None:
    later = [{**TRAIN, "loss": 4.0}, {**EVALUATION, "validation_loss": {"en": 3.0}}]
    other_phase = {**TRAIN, "phase": "alignment", "loss": 9.0}
    record = load_run(write_run(tmp_path, [{**TRAIN, "step": 2}, TRAIN, EVALUATION, *later, other_phase]))
    assert [(point.phase, point.step, point.loss) for point in record.train] == [
        ("alignment", 1, 9.0),
        ("language_model", 1, 4.0),
        ("language_model", 2, 5.0),
    ]
    assert [point.validation_loss for point in record.evaluations] == [{"en": 3.0}]


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_an_incomplete_line_of_a_killed_run_is_skipped(tmp_path: Path, cut: int) -> None:
    complete, incomplete = json.dumps(TRAIN), json.dumps({**TRAIN, "step": 2})[:cut]
    after = json.dumps({**TRAIN, "step": 3})
    (tmp_path / "metrics.jsonl").write_text(f"{complete}\n{incomplete}")
    assert [point.step for point in load_run(tmp_path).train] == [1]
    (tmp_path / "metrics.jsonl").write_text(f"{complete}\n{incomplete}\n{after}\n")
    assert [point.step for point in load_run(tmp_path).train] == [1, 3]


def test_an_incomplete_utf8_character_at_the_end_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(TRAIN).encode() + b'\n{"kind": "tr\xc3')
    assert len(load_run(tmp_path).train) == 1


def test_user_errors_name_the_location(tmp_path: Path) -> None:
    with user_error(tmp_path / "nowhere" / "metrics.jsonl", "does not exist"):
        load_run(tmp_path / "nowhere")
    broken = {key: value for key, value in EVALUATION.items() if key != "tokens"}
    with user_error("metrics.jsonl:2: ", "tokens"):
        load_run(write_run(tmp_path / "missing_field", [TRAIN, broken]))
    with user_error("recipe.yaml: ", "YAML"):
        load_run(write_run(tmp_path / "bad_recipe", [TRAIN], "model: [1"))
    with user_error("no runs"):
        write_report({}, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_report_json_contains_the_measurements(written: tuple[Path, dict]) -> None:
    directory, returned = written
    report = json.loads((directory / "report.json").read_text())
    assert report == returned
    aligned = report["runs"]["aligned"]
    assert aligned["validation_loss"] == {"en": 4.5, "de": 5.0}
    # Means of two numbers with one decimal: exact up to rounding of the last bit.
    assert aligned["word_retrieval_p_at_1"] == pytest.approx([0.9, 0.7, 0.5], abs=1e-12)
    assert aligned["word_retrieval_p_at_1_by_pair"]["en-fr"] == [0.8, 0.6, 0.4]
    assert aligned["word_retrieval_p_at_1_held_out"] == [0.2, 0.1, 0.0]
    assert aligned["after_alignment"] == [0.5, 0.5, 0.5]
    assert report["runs"]["joint"]["after_alignment"] is None
    assert (aligned["tokens"], aligned["seconds"]) == (4000, 40.0)
    assert aligned["recipe"] == report["recipe"] == {"model": {"num_layers": 1}, "alignment": {"lr": 0.1}}
    assert report["versions"] == {"torch": "2.13.0"}
    assert [point["tokens"] for point in aligned["history"]] == [100, 200, 3000, 4000]
    assert report["recipe_differences"] == {"alignment.lr": {"joint": None, "aligned": 0.1}}


def test_differences_are_against_the_first_run(runs: dict) -> None:
    change = build_report(runs)["differences"]
    assert list(change) == ["aligned"]
    assert change["aligned"]["validation_loss"] == {"en": -0.5, "de": -1.0}
    assert change["aligned"]["perplexity_ratio"]["de"] == pytest.approx(math.exp(-1.0), rel=1e-12)  # same formula
    assert change["aligned"]["word_retrieval_p_at_1"] == pytest.approx([0.5, 0.4, 0.3], abs=1e-12)  # float rounding
    assert change["aligned"]["tokens"] == 3000


def test_runs_are_compared_by_the_metrics_they_have_in_common(runs: dict) -> None:
    record, measurement = runs["aligned"]
    deeper = replace(measurement, validation_loss={"en": 4.0}, word_retrieval_p_at_1={"en-de": [0.5] * 7})
    bare = replace(measurement, validation_loss={}, word_retrieval_p_at_1={}, word_retrieval_p_at_1_held_out={})
    report = build_report({**runs, "deeper": (record, deeper), "bare": (record, bare)})
    assert report["differences"]["deeper"]["validation_loss"] == {"en": -1.0}
    assert report["differences"]["deeper"]["word_retrieval_p_at_1"] is None
    assert report["differences"]["bare"]["word_retrieval_p_at_1_mean"] is None
    assert "no metric in common" in report_table(report)


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, references and text."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_self_contained(written: tuple[Path, dict]) -> None:
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert text.count("<svg ") == 6
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text
    # Every fixed colour of the figures must be a variable, or dark mode would draw dark text on black.
    figures = text[text.index("<svg") :]
    assert not re.findall(r"#[0-9a-f]{6}\b", figures)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))


@pytest.mark.slow
def test_the_report_is_deterministic(written: tuple[Path, dict], runs: dict, tmp_path: Path) -> None:
    write_report(runs, tmp_path)
    for name in ("report.json", "report.html", "report.png"):
        assert (written[0] / name).read_bytes() == (tmp_path / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.png"]


@pytest.mark.slow
def test_hostile_names_and_values_stay_text(runs: dict, tmp_path: Path) -> None:
    record, measurement = runs["aligned"]
    record = replace(record, recipe={"note": "</pre><script>alert(1)</script>"})
    odd = replace(measurement, validation_loss={"<i>": math.nan, "en": 2000.0})
    like_a_plot = 'id="a" #0072b2 url(#b)'
    report = write_report({"_$x^{<b>": (record, odd), f"名前 {like_a_plot}": runs["joint"]}, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "<i>" not in text and "{<b>" not in text
    assert f"名前 {like_a_plot}</text>" in text
    assert report["runs"]["_$x^{<b>"]["validation_loss"] == {"<i>": None, "en": 2000.0}
    assert "NaN" not in (tmp_path / "report.json").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []


@pytest.mark.slow
def test_output_that_is_a_file_is_a_user_error_and_is_kept(runs: dict, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with user_error(f"{tmp_path / 'file'} is a file"):
        write_report(runs, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.slow
def test_a_failing_plot_leaves_the_old_report(runs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: f"old {name}".encode() for name in ("report.json", "report.html", "report.png")}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)

    def fail(figure: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise MemoryError

    monkeypatch.setattr(plots, "save_png", fail)
    with pytest.raises(MemoryError):
        write_report({"aligned": runs["aligned"]}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_single_run_needs_no_comparison(runs: dict) -> None:
    report = build_report({"aligned": runs["aligned"]})
    assert report["differences"] == {} and report["recipe_differences"] == {}
    page = render_page(report, {})
    assert "Differences" not in page and "differ" not in page
    assert "after 4k tokens" in page and "validation loss 4.500 on en" in page
    assert len(report_table(report).splitlines()) == 3


def test_the_table_is_aligned_and_complete(runs: dict) -> None:
    lines = report_table(build_report(runs)).splitlines()
    assert " ".join(lines[0].split()) == "run loss en loss de P@1 emb P@1 mean P@1 out held-out mean tokens time"
    assert lines[2].split() == ["joint", "5.000", "6.000", "0.40", "0.30", "0.20", "-", "1k", "1", "s"]
    assert lines[3].split() == ["aligned", "4.500", "5.000", "0.90", "0.70", "0.50", "0.10", "4k", "40", "s"]
    assert len(lines[0]) == len(lines[1]) == len(lines[2]) == len(lines[3])
    assert lines[4].startswith("aligned vs. joint: ")
    assert_facts(lines[4], "loss en -0.500", "loss de -1.000", "P@1 mean +0.40")


def test_sentence_retrieval_is_reported_if_measured(runs: dict, tmp_path: Path) -> None:
    record, measurement = runs["aligned"]
    by_pair = {"en-de": [0.2, 0.4, 0.9], "en-fr": [0.4, 0.6, 0.9]}
    with_sentences = {**runs, "sentences": (record, replace(measurement, sentence_retrieval_p_at_1=by_pair))}
    report = write_report(with_sentences, tmp_path)
    entry = report["runs"]["sentences"]
    assert entry["sentence_retrieval_p_at_1"] == pytest.approx([0.3, 0.5, 0.9], abs=1e-12)  # float rounding
    assert entry["sentence_retrieval_p_at_1_by_pair"] == by_pair
    header, _, *lines = report_table(report).splitlines()
    assert "held-out mean sentences mean tokens" in " ".join(header.split())
    assert [line.split()[7] for line in lines[:3]] == ["-", "-", "0.57"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert_facts(
        page, "P@1 sentences mean", "sentences, end of training, sentences", "P@1 of sentences by language pair"
    )
    assert "sentence retrieval p at 1" in page
    # The solid, the dashed and the dotted line have a legend; a report without sentences has no trace of them.
    assert "Retrieval by layer</text>" in page and "sentences</text>" in page
    without = build_report(runs)
    assert "sentence_retrieval_p_at_1" not in without["definitions"]
    assert "sentences" not in report_table(without)


def test_sentences_without_a_dictionary_are_drawn(runs: dict) -> None:
    record, measurement = runs["joint"]
    bare = replace(measurement, word_retrieval_p_at_1={}, word_retrieval_p_at_1_held_out={})
    assert plots.draw_by_layer({"joint": (record, bare)}) is None
    figure = plots.draw_by_layer({"joint": (record, replace(bare, sentence_retrieval_p_at_1={"en-de": [0.5, 0.6]}))})
    assert figure is not None
    (axis,) = figure.axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [[0.5, 0.6]]


def test_evaluations_of_runs_before_sentence_retrieval_are_read(runs: dict) -> None:
    assert all(point.sentence_retrieval_p_at_1 == {} for point in runs["aligned"][0].evaluations)


def test_thinning_keeps_means_ends_and_the_limit() -> None:
    points = [(float(x), float(x % 2)) for x in range(10_000)]
    thinned = plots.thin(points, limit=100)
    assert len(thinned) == 100 and thinned[-1][0] == 9999.0
    assert {y for _, y in thinned} == {0.5}
    assert plots.thin([(0.0, math.nan), (1.0, 2.0)]) == [(1.0, 2.0)]
    assert plots.thin([]) == []


def test_layers_are_named_from_both_ends() -> None:
    assert plots.layer_names(5) == ["emb", "1", "2", "3", "out"]
    assert plots.layer_names(2) == ["emb", "out"]


def test_recipe_differences_by_dotted_field() -> None:
    recipes = {
        "a": {"model": {"width": 1, "depth": 2}, "sources": [1, 2]},
        "b": {"model": {"width": 1, "depth": 3}, "sources": [1, 2]},
        "c": {"model": {"width": 1, "depth": 2}, "sources": [2], "alignment": {"lr": 1}},
    }
    assert recipe_differences(recipes) == {
        "model.depth": {"a": 2, "b": 3, "c": 2},
        "sources": {"a": [1, 2], "b": [1, 2], "c": [2]},
        "alignment.lr": {"a": None, "b": None, "c": 1},
    }


def test_the_alignment_loss_is_the_mean_over_aligned_layers(tmp_path: Path) -> None:
    lines = [
        {
            **TRAIN,
            "phase": "alignment",
            "phase_step": step,
            "step": step,
            "lm_loss": None,
            "alignment_loss": [None, 2.0, 4.0],
        }
        for step in (1, 2)
    ]
    record = load_run(write_run(tmp_path, [*lines, EVALUATION]))
    figure = plots.draw_training_loss({"subset": (record, last_measurement(record))})
    (axis,) = [axis for axis in figure.axes if "Alignment" in axis.get_title(loc="left")]
    assert axis.lines[0].get_xydata().tolist() == [[1.0, 3.0], [2.0, 3.0]]


def test_watch_points_are_sorted_and_the_later_line_of_a_step_wins(tmp_path: Path) -> None:
    unknown = copy.deepcopy(WATCH)
    unknown["pairs"]["en-de"]["negative_cosine"] = [None, 0.0]
    lines = [{**WATCH, "phase": "language_model", "step": 5}, {**WATCH, "step": 5}, WATCH, unknown]
    points = load_run(write_run(tmp_path, [*lines, EVALUATION])).watch
    assert [(point.phase, point.step) for point in points] == [
        ("alignment", 0),
        ("alignment", 5),
        ("language_model", 5),
    ]
    assert math.isnan(points[0].pairs["en-de"]["negative_cosine"][0])
    assert points[1].by_layer("p_at_1") == pytest.approx([0.2, 0.4], abs=1e-12)  # float rounding
    assert points[1].mean("positive_cosine") == 0.625
    incomplete = copy.deepcopy(WATCH)
    del incomplete["pairs"]["de-en"]["mrr"]
    with user_error("metrics.jsonl:1: ", "mrr"):
        load_run(write_run(tmp_path / "incomplete", [incomplete]))


def test_report_json_contains_the_watch(written: tuple[Path, dict]) -> None:
    report = json.loads((written[0] / "report.json").read_text())
    assert report["runs"]["joint"]["alignment_watch"] == []
    watch = report["runs"]["aligned"]["alignment_watch"]
    assert [(point["phase"], point["tokens"]) for point in watch] == [
        *(("alignment", tokens) for tokens in (0, 100, 200)),
        *(("language_model", tokens) for tokens in (3000, 4000)),
    ]
    assert watch[0] == {name: value for name, value in WATCH.items() if name != "kind"}
    assert "csls" in report["definitions"]


def test_the_watch_over_tokens_with_the_end_of_alignment(runs: dict) -> None:
    figure = plots.draw_watch(runs)
    retrieval, cosines = figure.axes
    curve, end = retrieval.lines
    # Means over two layers and two directions.
    assert curve.get_xdata().tolist() == [0, 100, 200, 3000, 4000]
    assert curve.get_ydata().tolist() == pytest.approx([0.3] * 5, abs=1e-12)  # float rounding
    assert end.get_xdata() == [200, 200]
    positive, negative, _ = cosines.lines
    assert positive.get_ydata().tolist() == [0.625] * 5
    assert negative.get_ydata().tolist() == [0.125] * 5
    assert retrieval.get_title(loc="left") == "P@1 of held-out words"
    # The watched run keeps its colour although it is the second run.
    assert curve.get_color() == plots.RUN_COLOURS[1]


def test_the_watch_by_layer_has_a_row_for_each_watched_run(runs: dict) -> None:
    figure = plots.draw_watch_by_layer(runs)
    retrieval, margin = figure.axes
    by_layer = [line.get_ydata().tolist() for line in retrieval.lines[:2]]
    assert by_layer == [pytest.approx([0.2] * 5, abs=1e-12), pytest.approx([0.4] * 5, abs=1e-12)]  # float rounding
    assert [line.get_ydata().tolist() for line in margin.lines[:2]] == [[0.25] * 5, [0.75] * 5]
    assert retrieval.lines[2].get_xdata() == [200, 200]


def test_the_page_shows_the_last_measurement_of_the_watch(written: tuple[Path, dict]) -> None:
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    table = text[text.index("Alignment watch, end of training") :]
    row = table[table.index("de-en") : table.index("</tr>", table.index("de-en"))]
    cells = re.findall(r"<td>([^<]*)</td>", row)
    assert cells == ["8 held-out", "0.40", "0.50", "0.50", "0.50", "0.62", "0.12"]


@pytest.mark.slow
def test_without_a_watch_the_report_does_not_mention_it(runs: dict, tmp_path: Path) -> None:
    joint = {"joint": runs["joint"]}
    assert plots.draw_watch(joint) is None
    assert plots.draw_watch_by_layer(joint) is None
    write_report(joint, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "watch" not in text and "CSLS" not in text
    # Two losses and retrieval by layer; with the watch two more panels.
    assert len([axis for axis in plots.draw_main(joint).axes if axis.get_visible()]) == 3
    assert len([axis for axis in plots.draw_main(runs).axes if axis.get_visible()]) == 5

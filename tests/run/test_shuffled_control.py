"""A run with a shuffled dictionary says so everywhere and is measured with true pairs; warnings about a dictionary that
cannot help."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.messages import assert_facts, user_error
from support.tiny import Tiny, recipe_of
from support.whole_runs import records, train_logged
from support.workers import WorkerPool

from megatron_prealign.checkpoint.state import SHUFFLED_DICTIONARY, read_state
from megatron_prealign.cli import main
from megatron_prealign.dictionary.table import load_table
from megatron_prealign.recipe import ParallelSection
from megatron_prealign.run.validate import validate

CPU = ParallelSection(device="cpu")


@pytest.fixture(scope="module")
def control(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("control") / "shuffled.safetensors"
    assert main(["dictionary", "shuffle", "--table", tiny.table, "--output", str(path), "--seed", "3"]) == 0
    return str(path)


def values_of(tiny: Tiny, run_dir: Path, **dictionary: Any) -> dict[str, Any]:
    values = tiny.values(run_dir)
    values["dictionary"].update(dictionary)
    values["alignment"]["train_iters"] = 2
    values["training"].update(train_iters=2, retrieval_words=50)
    values["parallel"] = {"device": "cpu"}
    return values


def report_of(runs: dict[str, Path], output: str) -> dict[str, Any] | None:
    """Runs in a worker: evaluates the runs."""
    from megatron_prealign.run.evaluate import evaluate_runs

    return evaluate_runs(runs, Path(output), CPU, leave_process_group=True)


def test_log_checkpoint_report_and_card_say_it(workers: WorkerPool, tiny: Tiny, tmp_path: Path, control: str) -> None:
    true = values_of(tiny, tmp_path / "true")
    shuffled = values_of(tiny, tmp_path / "shuffled", table=control, evaluation_table=tiny.table)
    # The words and their order are the same, so the steps draw the same words; only the pairs differ.
    (plain,), (lines,) = (
        workers.run(1, train_logged, values, str(tmp_path / name))
        for name, values in (("true", true), ("shuffled", shuffled))
    )
    (warning,) = (line for line in lines if "shuffled translations" in line)
    assert_facts(warning, control, "seed 3")
    assert "evaluation_table" not in warning
    assert not any("shuffled translations" in line for line in plain)
    checkpoints = [tmp_path / name / "checkpoints" / "step_00000004" for name in ("true", "shuffled")]
    true_state, state = (read_state(path)["run"] for path in checkpoints)
    assert state[SHUFFLED_DICTIONARY]["seed"] == 3 and SHUFFLED_DICTIONARY not in true_state
    report = workers.run(1, report_of, {name: tmp_path / name for name in ("true", "shuffled")}, str(tmp_path / "out"))[
        0
    ]
    assert report is not None
    assert [report["runs"][name]["shuffled_dictionary"] for name in ("true", "shuffled")] == [False, True]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert page.count("is a control:") == 1
    cards = []
    for path in checkpoints:
        model = tmp_path / f"model_{len(cards)}"
        assert main(["convert", "to-hf", "--checkpoint", str(path), "--output", str(model)]) == 0
        cards.append((model / "README.md").read_text("utf-8"))
    assert "It is a control" not in cards[0] and "It is a control" in cards[1]


def test_evaluations_measure_the_evaluation_table(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, control: str
) -> None:
    """Before training, the pairs alone determine the measurement."""
    watched = []
    for name, dictionary in (
        ("true", {}),
        ("measured", {"table": control, "evaluation_table": tiny.table}),
        ("shuffled", {"table": control}),
    ):
        values = values_of(tiny, tmp_path / name, **dictionary)
        values["alignment_watch"] = {"interval": 100, "groups": "trained", "words": 100}
        del values["alignment"]
        values["code_switch"] = None
        workers.run(1, train_logged, values, str(tmp_path / name))
        line = records(tmp_path / name, "alignment_watch")[("language_model", 0)]
        watched.append((line["words"], line["pairs"]["en-en_clone"]["positive_cosine"]))
    assert watched[0] == watched[1] != watched[2]


def test_a_control_without_its_true_table_is_measured_with_its_own_pairs(
    tiny: Tiny, tmp_path: Path, control: str
) -> None:
    assert_facts(validate(recipe_of(values_of(tiny, tmp_path, table=control), tmp_path)), control, "evaluation_table")
    missing = values_of(tiny, tmp_path, table=control, evaluation_table=str(tmp_path / "none"))
    with user_error(tmp_path / "none"):
        validate(recipe_of(missing, tmp_path))


def test_a_control_for_another_fraction_of_held_out_words(tiny: Tiny, tmp_path: Path, control: str) -> None:
    def messages(**dictionary: Any) -> str:
        values = values_of(tiny, tmp_path, table=control, evaluation_table=tiny.table, **dictionary)
        return validate(recipe_of(values, tmp_path))

    expected = "dictionary shuffle --held-out-fraction 0.2"
    text = messages(held_out_fraction=0.2)
    assert_facts(text, "dictionary.held_out_fraction is 0.2, expected 0.05", control, expected)
    assert expected not in messages(held_out_fraction=0.05)
    assert "shuffle --held-out-fraction" not in messages(held_out_fraction=0.0)


def test_noise_is_no_control(tiny: Tiny, tmp_path: Path) -> None:
    noisy = str(tmp_path / "noisy.safetensors")
    assert main(["dictionary", "shuffle", "--table", tiny.table, "--output", noisy, "--share", "0.25"]) == 0
    text = validate(recipe_of(values_of(tiny, tmp_path, table=noisy), tmp_path))
    assert_facts(text, f"{noisy} has noise: the translations of 25% of its words are shuffled (seed 0)")
    assert "is a control" not in text


def test_a_dictionary_that_is_drawn_less_than_once(tiny: Tiny, tmp_path: Path) -> None:
    """32 words a step; the table has about 300 groups of two languages."""
    values = values_of(tiny, tmp_path)
    values["dictionary"]["held_out_fraction"] = 0.0
    values["alignment"].update(train_iters=10, lr=2e-3)
    text = validate(recipe_of(values, tmp_path))
    (warning,) = (line for line in text.splitlines() if "draws a dictionary word" in line)
    (row,) = (line for line in text.splitlines() if line.startswith("dictionary "))
    words = int(row.split(" groups of ")[1].split(" ")[0].replace(",", ""))
    assert_facts(warning, f"{320 / words:.2f} times", "alignment.train_iters")
    assert_facts(row, f"drawn {320 / words:.2f} times each", "built without --corpus")
    assert_facts(text, "learning rate 0.002 in the alignment phase, then 0.001 (ratio 2)")
    values["alignment"]["train_iters"] = words // 32 + 1
    assert "draws a dictionary word" not in validate(recipe_of(values, tmp_path))


def test_coverage_of_each_language(tiny: Tiny, tmp_path: Path) -> None:
    values = values_of(tiny, tmp_path)
    text = validate(recipe_of(values, tmp_path))
    (row,) = (line for line in text.splitlines() if line.startswith("coverage "))
    english, clone = re.findall(r" en(?:_clone)? ([0-9.]+)%", row)
    # The clone has the words of the same text.
    assert english == clone and 20 < float(english) < 100
    assert "spell words alike" not in text
    table = load_table(tiny.table)
    # Another spelling of every vowel.
    spelled = bytes(table.word_text).translate(bytes.maketrans(b"aeiou", b"zzzzz"))
    replace(table, word_text=np.frombuffer(spelled, np.uint8)).save(tmp_path / "other.safetensors")
    values["dictionary"]["table"] = str(tmp_path / "other.safetensors")
    text = validate(recipe_of(values, tmp_path))
    assert_facts(text, f"of the running words of en are words of dictionary.table {tmp_path}", "spell words alike")


def test_tokens_of_a_guard_are_planned(tiny: Tiny, tmp_path: Path) -> None:
    values = values_of(tiny, tmp_path)
    values["training"].update(train_iters=None, train_tokens=100_000)
    planned = []
    for guard in (None, {"interval": 2}):
        values["alignment_guard"] = guard
        row = next(line for line in validate(recipe_of(values, tmp_path)).splitlines() if line.startswith("training "))
        planned.append(int(row.split("language_model ")[1].split(")")[0].replace(",", "")))
    assert planned[1] < planned[0]

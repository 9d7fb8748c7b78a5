"""The command `evaluate`: layouts that do not fit the model, missing files, other numbers of processes."""

import os
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_refused
from support.tiny import Tiny
from support.whole_runs import records, run
from support.workers import WorkerPool

from megatron_prealign import cli


@pytest.fixture(scope="module")
def trained(tiny: Tiny, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps; its global batch size of 8 is not divisible by 3 processes."""
    directory = tmp_path_factory.mktemp("trained")
    values = tiny.values(directory / "run")
    values["alignment"] = None
    values["training"].update(train_iters=3, eval_samples=4, retrieval_words=10)
    values["data"]["parallel_text"] = [tiny.sentences()]
    run(workers, 1, values, directory)
    return directory / "run"


@pytest.mark.parametrize(
    ("tensor", "facts"),
    [
        ("3", ("model.num_attention_heads is 4", "parallel.tensor_model_parallel_size (3)")),
        ("0", ("--tensor-model-parallel-size is 0", "positive")),
    ],
)
def test_layout_that_does_not_fit_the_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str, facts: tuple[str, ...]
) -> None:
    arguments = ["evaluate", "--run", f"a={trained}", "--output", str(tmp_path), "--device", "cpu"]
    status = cli.main([*arguments, "--tensor-model-parallel-size", tensor])
    assert_refused(status, capsys.readouterr().err, *facts)


def test_missing_metrics_are_found_before_evaluation(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_prealign.run import evaluate

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "checkpoints").symlink_to(trained / "checkpoints")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("evaluated before the runs were read")

    monkeypatch.setattr(evaluate, "_measure", refuse)
    status = cli.main(["evaluate", "--run", f"a={trained}", f"b={bare}", "--output", str(tmp_path / "report")])
    assert_refused(status, capsys.readouterr().err, bare / "metrics.jsonl", "does not exist")


def test_an_output_that_is_a_file_is_found_before_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").write_text("mine")
    status = cli.main(["evaluate", "--run", f"a={tmp_path / 'no'}", "--output", str(tmp_path / "report")])
    assert_refused(status, capsys.readouterr().err, tmp_path / "report", "is a file")


def measure(run_dir: str, output: str) -> dict[str, Any] | None:
    from megatron_prealign.recipe import ParallelSection
    from megatron_prealign.run.evaluate import evaluate_runs

    return evaluate_runs({"a": Path(run_dir)}, Path(output), ParallelSection(device="cpu"), leave_process_group=True)


def test_report_of_a_checkpoint_has_the_metrics_of_its_last_evaluation(
    trained: Path, workers: WorkerPool, tmp_path: Path
) -> None:
    report = workers.run(1, measure, str(trained), str(tmp_path))[0]
    *_, last = records(trained, "evaluation").values()
    entry = report["runs"]["a"]
    assert entry["validation_loss"] == last["validation_loss"]
    assert entry["validation_loss_words"] == last["validation_loss_words"]
    assert entry["history"][-1]["validation_loss_words"] == last["validation_loss_words"]
    for language, loss in entry["validation_loss"].items():
        by_class, shares = entry["validation_loss_words"][language], entry["word_shares"][language]
        assert set(by_class) == set(shares) > {"trained", "other"} - {"held_out"}
        # Sums in float64 and in float32.
        assert sum(by_class[name] * share for name, share in shares.items()) == pytest.approx(loss, rel=1e-5)
    for metric in ("word_retrieval_p_at_1", "sentence_retrieval_p_at_1"):
        assert entry[f"{metric}_by_pair"] == last[metric] != {}
        assert entry[metric] == entry["history"][-1][metric] == last[metric]["en-en_clone"]


@pytest.mark.slow
def test_number_of_processes_that_does_not_divide_the_batch(trained: Path, workers: WorkerPool, tmp_path: Path) -> None:
    single = workers.run(1, measure, str(trained), str(tmp_path / "1"))[0]
    of_three = workers.run(3, measure, str(trained), str(tmp_path / "3"))
    assert of_three[1:] == [None, None]
    for language, loss in single["runs"]["a"]["validation_loss"].items():
        # Sums of a few thousand float32 losses in another order.
        assert of_three[0]["runs"]["a"]["validation_loss"][language] == pytest.approx(loss, rel=1e-5)
    assert os.path.exists(tmp_path / "3" / "report.json")

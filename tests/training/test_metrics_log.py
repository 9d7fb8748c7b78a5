"""Metrics reach every sink; a sink that fails is dropped; the scalars of each kind of record."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts

from megatron_prealign.training.metrics_file import MetricsFile
from megatron_prealign.training.metrics_log import MetricsLog, scalars

TRAIN = {
    "kind": "train",
    "phase": "alignment",
    "step": 3,
    "phase_step": 3,
    "loss": 2.5,
    "lm_loss": None,
    "alignment_loss": [1.0, None, 3.0],
    "switched_words": {"de": 7},
}


class Failing:
    """A sink whose server is gone."""

    name = "the server"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def write(self, record: Mapping[str, Any]) -> None:
        self.calls.append(f"step {record['step']}")
        raise ConnectionError("no route")

    def close(self) -> None:
        self.calls.append("close")
        raise ConnectionError("still no route")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_failing_sink_is_reported_once_and_the_others_go_further(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, failing = tmp_path / "metrics.jsonl", Failing()
    metrics = MetricsLog([failing, MetricsFile(path)])
    with caplog.at_level(logging.WARNING):
        metrics.write(TRAIN)
        metrics.write({**TRAIN, "step": 4})
        metrics.close()
    assert failing.calls == ["step 3"]
    (message,) = caplog.messages
    assert_facts(message, "the server", "step 3", "ConnectionError", "no route", "continues")
    assert lines(path) == [TRAIN, {**TRAIN, "step": 4}]


def test_a_failure_at_the_end_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    MetricsLog([Failing()]).close()
    (message,) = caplog.messages
    assert_facts(message, "the server", "still no route")


def test_a_line_of_the_file_may_be_lost_and_the_next_one_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = MetricsLog([MetricsFile(path)])
    metrics.write(TRAIN)
    path.parent.mkdir()
    metrics.write({**TRAIN, "step": 4})
    assert [line["step"] for line in lines(path)] == [4]
    (message,) = caplog.messages
    assert_facts(message, path, "step 3")


def test_a_line_after_an_incomplete_one_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write(TRAIN)
    with path.open("a") as file:
        file.write('{"kind": "train", "ste')
    metrics.write({**TRAIN, "step": 4, "phase": "größer"})
    metrics.write({**TRAIN, "step": 5})
    assert [(record["step"], record["phase"]) for record in metrics.read("train")] == [
        (3, "alignment"),
        (4, "größer"),
        (5, "alignment"),
    ]
    assert len(path.read_bytes().splitlines()) == 4


def test_scalars_of_training() -> None:
    assert scalars(TRAIN) == {
        "alignment/loss": 2.5,
        "alignment/alignment_loss/0": 1.0,
        "alignment/alignment_loss/2": 3.0,
        "alignment/switched_words/de": 7,
    }


def test_scalars_of_other_records() -> None:
    place = {"phase": "language_model", "step": 3, "tokens": 70, "seconds": 1.5}
    by_class = {"validation_loss_words": {"de": {"trained": 1.5, "other": 3.0}}}
    evaluation = {"validation_loss": {"de": 2.0}, **by_class, "word_retrieval_p_at_1": {"en-de": [0.5, 0.25]}}
    assert scalars({"kind": "evaluation", **place, **evaluation}) == {
        "validation_loss/de": 2.0,
        "validation_loss_words/de/trained": 1.5,
        "validation_loss_words/de/other": 3.0,
        "word_retrieval_p_at_1/en-de/0": 0.5,
        "word_retrieval_p_at_1/en-de/1": 0.25,
        "word_retrieval_p_at_1/en-de/mean": 0.375,
    }
    watch = {"groups": "held_out", "words": {"en-de": 3}, "pairs": {"en-de": {"mrr": [0.5, 0.75], "cosine": [None, 1]}}}
    assert scalars({"kind": "alignment_watch", **place, **watch}) == {
        "alignment_watch_mrr/en-de/0": 0.5,
        "alignment_watch_mrr/en-de/1": 0.75,
        "alignment_watch_mrr/en-de/mean": 0.625,
        # No mean over an unknown value.
        "alignment_watch_cosine/en-de/1": 1,
    }
    save = {"kind": "checkpoint", "phase": "alignment", "step": 3, "paused_s": 0.5, "bytes": 9}
    assert scalars(save) == {"checkpoint/paused_s": 0.5, "checkpoint/bytes": 9}
    assert all(math.isfinite(value) for value in scalars(save).values())

"""Records of a study without training: metrics written by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_prealign.evaluation.run_record import load_run
from megatron_prealign.study.cost import Cost
from megatron_prealign.study.definition import Study, StudyRun
from megatron_prealign.study.matrix import Job
from megatron_prealign.study.records import JobRecord, StudyRecords

LAYERS = 5
PAIR = "en-de"
Metrics = list[dict[str, Any]]


def study_of(directory: Path, runs: Sequence[StudyRun], seeds: Sequence[int] = (1, 2)) -> Study:
    return Study(output=str(directory / "study"), base=["base.yaml"], seeds=list(seeds), runs=list(runs))


def class_recipe() -> Any:
    """What the classes of words depend on; equal in all runs."""
    data = SimpleNamespace(tokenizer="tokenizer", seq_length=8, validation=["text"])
    return SimpleNamespace(dictionary=None, data=data, training=SimpleNamespace(eval_samples=1))


def job_of(study: Study, run: str, seed: int) -> Job:
    output = Path(study.output)
    name = f"{run}_seed{seed}"
    return Job(run, seed, class_recipe(), output / "recipes" / f"{name}.yaml", output / "runs" / name)


def evaluation(tokens: int, loss: Mapping[str, float], p_at_1: float | None = None, **fields: Any) -> dict[str, Any]:
    """An evaluation in which held-out words have half of the P@1."""
    retrieval = {"word_retrieval_p_at_1": {}, "word_retrieval_p_at_1_held_out": {}}
    if p_at_1 is not None:
        retrieval["word_retrieval_p_at_1"] = {PAIR: [p_at_1] * LAYERS}
        retrieval["word_retrieval_p_at_1_held_out"] = {PAIR: [p_at_1 / 2] * LAYERS}
    common = {"kind": "evaluation", "phase": "language_model", "step": tokens // 10, "tokens": tokens}
    return {**common, "seconds": tokens / 100, "validation_loss": dict(loss), **retrieval, **fields}


def watch(tokens: int, p_at_1: float, **fields: Any) -> dict[str, Any]:
    """A measurement of the alignment watch, the same in both directions."""
    names = ("p_at_1", "mrr", "p_at_1_csls", "mrr_csls", "positive_cosine", "negative_cosine")
    pairs = dict.fromkeys((PAIR, "de-en"), {name: [p_at_1] * LAYERS for name in names})
    common = {"kind": "alignment_watch", "phase": "language_model", "step": tokens // 10, "tokens": tokens}
    measured = {"groups": "held_out", "words": dict.fromkeys(pairs, 9), "pairs": pairs}
    return {**common, "seconds": tokens / 100, **measured, **fields}


def write_metrics(directory: Path, lines: Metrics) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def records_of(study: Study, metrics: Mapping[tuple[str, int], Metrics]) -> StudyRecords:
    """Records of the jobs in `metrics`; the other jobs are not complete."""
    jobs = [job_of(study, run.name, seed) for seed in study.seeds for run in study.runs]
    complete = []
    for job in jobs:
        if (job.run, job.seed) in metrics:
            write_metrics(job.directory, metrics[job.run, job.seed])
            record = load_run(job.directory)
            last = record.evaluations[-1]
            cost = Cost({"seconds": last.seconds, "tokens": float(last.tokens)}, {"memory_gb": "not logged"})
            complete.append(JobRecord(job, record, cost))
    absent = {job.name: "not complete" for job in jobs if (job.run, job.seed) not in metrics}
    return StudyRecords(study, jobs, complete, absent)


def many_runs(directory: Path, count: int = 13) -> StudyRecords:
    """Records of many runs with near results, three seeds each; the last four runs are a sweep."""
    runs = [
        StudyRun(name=f"alignment_switching_{number}", at={"guard interval": 10.0**number} if number > 8 else {})
        for number in range(count)
    ]
    study = study_of(directory, runs, (1, 2, 3))
    metrics = {}
    for number, run in enumerate(runs):
        for seed in study.seeds:
            p_at_1 = 0.9 + 0.005 * (number % 5) + 0.001 * seed
            losses = {"en": 4.3 + 0.01 * number + 0.01 * seed, "de": 5.5 + 0.012 * (number % 7) + 0.01 * seed}
            metrics[run.name, seed] = [
                *(watch(tokens, p_at_1 / 2) for tokens in (0, 200, 400, 600, 800, 1000)),
                *(evaluation(tokens, losses, p_at_1) for tokens in (500, 1000)),
            ]
    return records_of(study, metrics)

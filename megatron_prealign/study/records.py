"""What the complete runs of a study have recorded, each read once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.run_record import RunRecord, load_run
from megatron_prealign.study.cost import Cost, cost_rows, read_cost
from megatron_prealign.study.definition import Study
from megatron_prealign.study.execution import last_step
from megatron_prealign.study.matrix import Job
from megatron_prealign.study.results import Row, rows_of
from megatron_prealign.training.metrics_file import METRICS_FILE


@dataclass(frozen=True)
class JobRecord:
    """A complete job with at least one evaluation."""

    job: Job
    record: RunRecord
    cost: Cost


@dataclass(frozen=True)
class StudyRecords:
    """All that the tables, plots and the page of a study are made of."""

    study: Study
    jobs: Sequence[Job]
    """All jobs of the study."""
    complete: Sequence[JobRecord]
    absent: Mapping[str, str]
    """Name of each other job -> why it has no results."""

    @cached_property
    def rows(self) -> list[Row]:
        """Rows of results.csv: the last evaluation and the cost of each complete job."""
        return [
            row
            for each in self.complete
            for row in (*rows_of(each.job, each.record.evaluations[-1]), *cost_rows(each.job, each.cost))
        ]

    def missing_seeds(self, run: str) -> str:
        """How many seeds of a run are complete, such as ` (2 of 3 seeds)`; empty if all or none are."""
        complete, seeds = len(self.of_run(run)), len(self.study.seeds)
        return f" ({complete} of {seeds} seeds)" if 0 < complete < seeds else ""

    def of_run(self, name: str) -> list[RunRecord]:
        """Records of the complete jobs of a run, one per seed."""
        return [each.record for each in self.complete if each.job.run == name]


def read_records(study: Study, jobs: Sequence[Job]) -> StudyRecords:
    """Reads the metrics and the last checkpoint's counters of every complete job."""
    complete: list[JobRecord] = []
    absent: dict[str, str] = {}
    for job in jobs:
        step = last_step(job)
        if step is None:
            absent[job.name] = "not complete"
            continue
        try:
            record = load_run(job.directory)
        except UserError as error:
            absent[job.name] = str(error)
            continue
        if not record.evaluations:
            absent[job.name] = f"no evaluation in {job.directory / METRICS_FILE}"
            continue
        if record.evaluations[-1].step != step:
            # Lost with a full disk, or an incomplete line: an earlier one is not the end of training.
            absent[job.name] = (
                f"no evaluation of the last step, {step:,}, in {job.directory / METRICS_FILE}; remove the run "
                "directory to train the run again"
            )
            continue
        complete.append(JobRecord(job, record, read_cost(job, record)))
    return StudyRecords(study, jobs, complete, absent)

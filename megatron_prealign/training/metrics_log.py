"""The metrics of a run and where they are written: metrics.jsonl, TensorBoard, Weights & Biases.

A record is a dictionary with `kind` ("train", "evaluation", "alignment_watch", "embeddings" or "checkpoint"), `phase`,
`step` and the values of that kind.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_prealign.recipe import Recipe
from megatron_prealign.training.metrics_file import METRICS_FILE, MetricsFile

logger = logging.getLogger(__name__)

# Fields of a record that say which values it has, not part of them.
_PLACE = ("kind", "phase", "step", "phase_step")


class MetricsSink(Protocol):
    """Where metrics are written."""

    name: str

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record; may raise any exception."""

    def close(self) -> None:
        """Writes what is pending; may raise any exception."""


class MetricsLog:
    """Writes every record to all sinks. A sink that fails is reported once and not used again, because the other ranks
    are already in the next step: metrics must not end a run."""

    def __init__(self, sinks: Sequence[MetricsSink] = ()) -> None:
        """
        Args:
            sinks: Empty on all ranks but the first.
        """
        self._sinks = list(sinks)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record."""
        for sink in list(self._sinks):
            try:
                sink.write(record)
            except Exception as error:
                self._sinks.remove(sink)
                logger.warning(
                    "cannot write metrics to %s from step %d on: %s: %s; training continues without it",
                    sink.name,
                    record["step"],
                    type(error).__name__,
                    error,
                )

    def read(self, kind: str) -> Iterator[Mapping[str, Any]]:
        """Yields the records of a kind that the run has written so far; none on all ranks but the first."""
        for sink in self._sinks:
            if isinstance(sink, MetricsFile):
                yield from sink.read(kind)

    def close(self) -> None:
        """Closes all sinks."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                logger.warning("cannot write the last metrics to %s: %s: %s", sink.name, type(error).__name__, error)
        self._sinks.clear()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Maps a record to tag -> scalar, such as `language_model/loss` and `validation_loss/en`; values per layer have the
    layer's index as the last part of the tag, and `mean`."""
    kind = record["kind"]
    if kind == "train":
        return dict(_flat(record["phase"], {name: value for name, value in record.items() if name not in _PLACE}))
    if kind == "checkpoint":
        return dict(_flat("checkpoint", {name: value for name, value in record.items() if name not in _PLACE}))
    if kind == "alignment_watch":
        return {
            tag: value
            for direction, by_metric in record["pairs"].items()
            for metric, by_layer in by_metric.items()
            for tag, value in _by_layer(f"alignment_watch_{metric}/{direction}", by_layer)
        }
    return {
        tag: value
        for metric, by_name in record.items()
        if isinstance(by_name, Mapping)
        for name, measured in by_name.items()
        for tag, value in (
            _by_layer(f"{metric}/{name}", measured)
            if isinstance(measured, Sequence)
            else _flat(f"{metric}/{name}", measured)
        )
    }


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{prefix}/{name}", item)
    elif isinstance(value, list):
        yield from _flat(prefix, dict(enumerate(value)))
    elif isinstance(value, int | float):
        yield prefix, value


def _by_layer(prefix: str, values: Sequence[float | None]) -> Iterator[tuple[str, float]]:
    known = [value for value in values if value is not None]
    yield from _flat(prefix, list(values))
    if known and len(known) == len(values):
        yield f"{prefix}/mean", math.fsum(known) / len(known)


def open_metrics(recipe: Recipe) -> MetricsLog:
    """Opens the sinks that the recipe's section `logging` selects; call on the first rank only.

    Raises:
        UserError: Weights & Biases cannot be used as configured.
    """
    run_dir = Path(recipe.logging.run_dir)
    sinks: list[MetricsSink] = [MetricsFile(run_dir / METRICS_FILE)]
    if recipe.logging.tensorboard:
        from megatron_prealign.training.tensorboard import TensorBoard

        sinks.append(TensorBoard(run_dir / "tensorboard"))
    if recipe.logging.wandb:
        from megatron_prealign.training.wandb import start_wandb

        sinks += start_wandb(recipe)
    return MetricsLog(sinks)

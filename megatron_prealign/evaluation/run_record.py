"""Reads what a run left in its directory: metrics.jsonl, recipe.yaml and versions.json."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.measures import MEASURES
from megatron_prealign.recipe.phases import ALIGNMENT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainPoint:
    """One logged training step. A value that is not finite is NaN here and null in the report."""

    phase: str
    step: int
    """Optimizer steps since the start of the run, over all phases."""
    phase_step: int
    tokens: int
    """Tokens seen since the start of the run, over all phases."""
    seconds: float
    loss: float
    lm_loss: float | None
    alignment_loss: tuple[float, ...]
    """One contrastive loss a layer, NaN for a layer that is not aligned; empty where no step had words."""
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    switched_word_rate: float | None
    memory_gb: float | None


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation during training."""

    phase: str
    step: int
    tokens: int
    seconds: float
    validation_loss: dict[str, float]
    """Nats per token, by language."""
    word_retrieval_p_at_1: dict[str, list[float]]
    """By language pair: one share from 0 to 1 a layer, the embedding output first, the output embedding last."""
    word_retrieval_p_at_1_held_out: dict[str, list[float]]
    """The same over the words never trained on; empty when none are held out."""


@dataclass(frozen=True)
class WatchPoint:
    """One measurement of the alignment watch."""

    phase: str
    step: int
    tokens: int
    seconds: float
    groups: str
    """Which words of the dictionary: held_out or trained."""
    words: dict[str, int]
    """Words that were asked for, by direction such as `en-de`."""
    pairs: dict[str, dict[str, list[float]]]
    """Direction -> measure (those of `evaluation.measures`) -> one value a layer, NaN where it is not known."""

    def by_layer(self, measure: str) -> list[float]:
        """Mean over the directions, layer by layer."""
        layers = zip(*(by_name[measure] for by_name in self.pairs.values()), strict=True)
        return [sum(values) / len(values) for values in layers]

    def mean(self, measure: str) -> float:
        """Mean over the directions and the layers."""
        values = self.by_layer(measure)
        return sum(values) / len(values)


@dataclass(frozen=True)
class Measurement:
    """What a finished model was measured to be; the report's numbers at the end of a run."""

    validation_loss: dict[str, float]
    """Nats per token, by language."""
    word_retrieval_p_at_1: dict[str, list[float]]
    """By language pair: one share from 0 to 1 a layer, the embedding output first, the output embedding last."""
    word_retrieval_p_at_1_held_out: dict[str, list[float]]
    """The same over the words never trained on; empty when none are held out."""
    tokens: int
    """Tokens trained on, all phases together."""
    seconds: float
    """Wall-clock seconds of training, all phases together."""


@dataclass(frozen=True)
class RunRecord:
    """One run directory in memory, points in the order of training."""

    path: Path
    train: list[TrainPoint]
    evaluations: list[EvaluationPoint]
    watch: list[WatchPoint]
    """Empty for a run without the alignment watch."""
    recipe: dict[str, Any]
    """The resolved recipe; empty when the directory has none."""
    versions: dict[str, Any]
    """Versions of what the run used; empty when the directory has none."""

    @property
    def after_alignment(self) -> EvaluationPoint | None:
        """The last evaluation of the alignment phase; None when there was none."""
        points = [point for point in self.evaluations if point.phase == ALIGNMENT]
        return points[-1] if points else None

    @property
    def alignment_end_tokens(self) -> int | None:
        """Tokens seen when the alignment phase ended; None for a run without one."""
        points: list[TrainPoint | EvaluationPoint | WatchPoint] = [*self.train, *self.evaluations, *self.watch]
        return max((point.tokens for point in points if point.phase == ALIGNMENT), default=None)


def load_run(path: str | Path) -> RunRecord:
    """Reads a run directory.

    A resumed run may have logged a step twice: the later line wins. A line cut off by a kill is left out (with a
    warning, unless it is the last one).

    Raises:
        UserError: no metrics.jsonl there, or a line that is whole but not a metric.
    """
    directory = Path(path)
    metrics = directory / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{directory}: no metrics.jsonl there; expected the run_dir of a run that has trained")
    train: dict[tuple[str, int], TrainPoint] = {}
    evaluations: dict[tuple[str, int], EvaluationPoint] = {}
    watch: dict[tuple[str, int], WatchPoint] = {}
    lines = metrics.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        values = _parse_line(line, f"{metrics}:{number}", is_last=not any(rest.strip() for rest in lines[number:]))
        if values is None:
            continue
        try:
            if values["kind"] == "train":
                point = _train_point(values)
                train[point.phase, point.step] = point
            elif values["kind"] == "evaluation":
                evaluation = _evaluation_point(values)
                evaluations[evaluation.phase, evaluation.step] = evaluation
            elif values["kind"] == "alignment_watch":
                seen = _watch_point(values)
                watch[seen.phase, seen.step] = seen
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{metrics}:{number}: not a metric of this version: {type(error).__name__} {error}; "
                "expected a line written by `megatron-prealign pretrain`"
            ) from error
    return RunRecord(
        path=directory,
        train=sorted(train.values(), key=_order),
        evaluations=sorted(evaluations.values(), key=_order),
        watch=sorted(watch.values(), key=_order),
        recipe=_load_recipe(directory / "recipe.yaml"),
        versions=_load_versions(directory / "versions.json"),
    )


def _order(point: TrainPoint | EvaluationPoint | WatchPoint) -> tuple[int, bool]:
    # the step on which alignment ends may be evaluated in both phases
    return point.step, point.phase != ALIGNMENT


def _parse_line(line: bytes, where: str, *, is_last: bool) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        values = json.loads(line)
    except ValueError:
        # a killed process leaves half a line, and the resumed one may have written on behind it
        if not is_last:
            logger.warning("%s: not whole JSON, left out", where)
        return None
    if not isinstance(values, dict):
        raise UserError(f"{where}: got {type(values).__name__}, expected a JSON object a line")
    return values


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _train_point(values: Mapping[str, Any]) -> TrainPoint:
    return TrainPoint(
        phase=str(values["phase"]),
        step=int(values["step"]),
        phase_step=int(values["phase_step"]),
        tokens=int(values["tokens"]),
        seconds=float(values["seconds"]),
        loss=_number(values["loss"]),
        lm_loss=_optional(values.get("lm_loss")),
        alignment_loss=tuple(_number(loss) for loss in values.get("alignment_loss") or ()),
        learning_rate=_number(values["learning_rate"]),
        grad_norm=_number(values["grad_norm"]),
        tokens_per_second=_number(values["tokens_per_second"]),
        switched_word_rate=_optional(values.get("switched_word_rate")),
        memory_gb=_optional(values.get("memory_gb")),
    )


def _evaluation_point(values: Mapping[str, Any]) -> EvaluationPoint:
    return EvaluationPoint(
        phase=str(values["phase"]),
        step=int(values["step"]),
        tokens=int(values["tokens"]),
        seconds=float(values["seconds"]),
        validation_loss={language: _number(loss) for language, loss in (values.get("validation_loss") or {}).items()},
        word_retrieval_p_at_1=_by_pair(values.get("word_retrieval_p_at_1")),
        word_retrieval_p_at_1_held_out=_by_pair(values.get("word_retrieval_p_at_1_held_out")),
    )


def _watch_point(values: Mapping[str, Any]) -> WatchPoint:
    return WatchPoint(
        phase=str(values["phase"]),
        step=int(values["step"]),
        tokens=int(values["tokens"]),
        seconds=float(values["seconds"]),
        groups=str(values["groups"]),
        words={direction: int(count) for direction, count in values["words"].items()},
        pairs={
            direction: {name: [_number(value) for value in by_name[name]] for name in MEASURES}
            for direction, by_name in values["pairs"].items()
        },
    )


def _by_pair(values: Mapping[str, Any] | None) -> dict[str, list[float]]:
    return {pair: [_number(share) for share in layers] for pair, layers in (values or {}).items()}


def _load_recipe(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return _mapping(recipe, path)


def _load_versions(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")), path)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: got {type(value).__name__}, expected a mapping")
    return value

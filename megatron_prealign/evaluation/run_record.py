"""Reads metrics.jsonl, recipe.yaml and versions.json of a run directory."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.commit import RECIPE_FILE
from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.retrieval_metrics import METRICS
from megatron_prealign.files.yaml_text import YamlError, load_yaml, read_utf8
from megatron_prealign.recipe.phases import ALIGNMENT
from megatron_prealign.training.metrics_file import METRICS_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainPoint:
    """One logged training step. Values that are not finite are NaN here and null in the report."""

    phase: str
    step: int
    """Optimizer steps since the start of the run, over all phases."""
    phase_step: int
    tokens: int
    """Tokens consumed since the start of the run, over all phases."""
    seconds: float
    loss: float
    lm_loss: float | None
    alignment_loss: tuple[float, ...]
    """Contrastive loss per layer, NaN for layers that are not aligned; empty if no step had words."""
    memory_gb: float | None
    """Peak memory of the process so far, in GB; None if it was not logged."""


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation during training."""

    phase: str
    step: int
    tokens: int
    seconds: float
    validation_loss: dict[str, float]
    """Language -> loss in nats per token."""
    word_retrieval_p_at_1: dict[str, list[float]]
    """Language pair -> P@1 (0 to 1) per layer, from the embedding output to the output embedding."""
    word_retrieval_p_at_1_held_out: dict[str, list[float]]
    """The same for held-out words, which are never trained on; empty if none are held out."""
    sentence_retrieval_p_at_1: dict[str, list[float]] = field(default_factory=dict)
    """The same for sentences of parallel text; empty without it."""
    validation_loss_words: dict[str, dict[str, float]] = field(default_factory=dict)
    """Language -> class of word (one of `word_classes.CLASSES`) -> loss in nats per token; empty without a
    dictionary."""


@dataclass(frozen=True)
class WatchPoint:
    """One measurement of the alignment watch."""

    phase: str
    step: int
    tokens: int
    seconds: float
    groups: str
    """Dictionary words measured: held_out or trained."""
    words: dict[str, int]
    """Direction such as `en-de` -> number of query words."""
    pairs: dict[str, dict[str, list[float]]]
    """Direction -> metric (one of `METRICS`) -> one value per layer, NaN if undefined."""

    def by_layer(self, metric: str) -> list[float]:
        """Mean over the directions, per layer."""
        layers = zip(*(by_name[metric] for by_name in self.pairs.values()), strict=True)
        return [sum(values) / len(values) for values in layers]

    def mean(self, metric: str) -> float:
        """Mean over the directions and the layers."""
        values = self.by_layer(metric)
        return sum(values) / len(values)


@dataclass(frozen=True)
class Measurement:
    """Metrics of a trained model: the values at the end of training in the report."""

    validation_loss: dict[str, float]
    """Language -> loss in nats per token."""
    word_retrieval_p_at_1: dict[str, list[float]]
    """Language pair -> P@1 (0 to 1) per layer, from the embedding output to the output embedding."""
    word_retrieval_p_at_1_held_out: dict[str, list[float]]
    """The same for held-out words, which are never trained on; empty if none are held out."""
    tokens: int
    """Tokens trained on, over all phases."""
    seconds: float
    """Wall-clock seconds of training, over all phases."""
    sentence_retrieval_p_at_1: dict[str, list[float]] = field(default_factory=dict)
    """P@1 of sentences of parallel text, as for words; empty without it."""
    shuffled_dictionary: bool = False
    """Whether the run is a control, trained with a shuffled dictionary."""
    validation_loss_words: dict[str, dict[str, float]] = field(default_factory=dict)
    """Language -> class of word (one of `word_classes.CLASSES`) -> loss in nats per token; empty without a
    dictionary."""
    word_shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """Language -> class of word -> fraction of the tokens that `validation_loss` is measured on."""


@dataclass(frozen=True)
class RunRecord:
    """Contents of one run directory, with points in training order."""

    path: Path
    train: list[TrainPoint]
    evaluations: list[EvaluationPoint]
    watch: list[WatchPoint]
    """Empty for a run without the alignment watch."""
    recipe: dict[str, Any]
    """The resolved recipe; empty if the directory has none."""
    versions: dict[str, Any]
    """Versions of the software used; empty if the directory has none."""

    @property
    def after_alignment(self) -> EvaluationPoint | None:
        """Last evaluation of the alignment phase; None if there was none."""
        points = [point for point in self.evaluations if point.phase == ALIGNMENT]
        return points[-1] if points else None

    @property
    def alignment_end_tokens(self) -> int | None:
        """Tokens consumed at the end of the alignment phase; None for a run without one."""
        points: list[TrainPoint | EvaluationPoint | WatchPoint] = [*self.train, *self.evaluations, *self.watch]
        return max((point.tokens for point in points if point.phase == ALIGNMENT), default=None)


def load_run(path: str | Path) -> RunRecord:
    """Reads a run directory.

    A resumed run may have logged a step twice; the later line wins. An incomplete line left by a killed run is skipped
    (with a warning, unless it is the last line).

    Raises:
        UserError: metrics.jsonl does not exist, or a line is valid JSON but not a metric.
    """
    directory = Path(path)
    metrics = directory / METRICS_FILE
    if not metrics.is_file():
        raise UserError(f"{metrics} does not exist; expected the logging.run_dir of a run that has trained")
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
                watched = _watch_point(values)
                watch[watched.phase, watched.step] = watched
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{metrics}:{number}: not a metric of this version ({type(error).__name__}: {error}), expected a line "
                "written by `megatron-prealign pretrain`"
            ) from error
    return RunRecord(
        path=directory,
        train=sorted(train.values(), key=_order),
        evaluations=sorted(evaluations.values(), key=_order),
        watch=sorted(watch.values(), key=_order),
        recipe=_load_recipe(directory / RECIPE_FILE),
        versions=_load_versions(directory / "versions.json"),
    )


def _order(point: TrainPoint | EvaluationPoint | WatchPoint) -> tuple[int, bool]:
    # The step at which alignment ends may be evaluated in both phases.
    return point.step, point.phase != ALIGNMENT


def _parse_line(line: bytes, where: str, *, is_last: bool) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        values = json.loads(line)
    except ValueError:
        # A killed process leaves an incomplete line.
        if not is_last:
            logger.warning("%s: incomplete JSON, skipped the line", where)
        return None
    if not isinstance(values, dict):
        raise UserError(f"{where}: got {type(values).__name__}, expected a JSON object per line")
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
        sentence_retrieval_p_at_1=_by_pair(values.get("sentence_retrieval_p_at_1")),
        validation_loss_words={
            language: {name: _number(loss) for name, loss in by_class.items()}
            for language, by_class in (values.get("validation_loss_words") or {}).items()
        },
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
            direction: {name: [_number(value) for value in by_name[name]] for name in METRICS}
            for direction, by_name in values["pairs"].items()
        },
    )


def _by_pair(values: Mapping[str, Any] | None) -> dict[str, list[float]]:
    return {pair: [_number(value) for value in layers] for pair, layers in (values or {}).items()}


def _load_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        recipe = load_yaml(read_utf8(path))
    except YamlError as error:
        raise UserError(f"{path}: {error}") from error
    return _mapping(recipe, path)


def _load_versions(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")), path)
    except ValueError as error:
        raise UserError(f"{path}: invalid JSON: {error}") from error


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: got {type(value).__name__}, expected a mapping")
    return value

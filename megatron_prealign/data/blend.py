"""Tracks the samples consumed from each source, so that a run can resume with other weights or sources.

No sample repeats within an epoch of its source. A blend starts at a position of the run. From there its weights
determine which source provides the next sample, and each source continues in its own order. A run that never changes
its sources or weights has one blend, starting at position 0.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prealign.data.sources import OpenSource
from megatron_prealign.errors import UserError
from megatron_prealign.runtime.log import warn_on_rank_zero

logger = logging.getLogger(__name__)

NEW_RUN = "set checkpoint.directory (or logging.run_dir) to a new directory"
"""Advice if a run cannot resume."""


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """A source of a blend: its identity and its position."""

    key: int
    """Number of the source in the run; determines its sample order and is never reused."""
    path: str
    """Prefix of its files when last opened; they may move."""
    language: str
    """Language code."""
    weight: float
    """Weight in the recipe."""
    documents: int
    """Number of documents of the complete dataset."""
    tokens: int
    """Number of tokens of the complete dataset."""
    training_documents: int
    """Number of documents not held out for validation."""
    training_tokens: int
    """Number of tokens of the training documents."""
    digest: str
    """Hash of the sequence lengths of the training documents."""
    checksum: str
    """Checksum of the .bin file from the sidecar; empty if it has none."""
    samples_per_epoch: int
    """Number of samples in an epoch."""
    consumed_at_start: int
    """Number of samples consumed before the blend started."""

    def same_content(self, other: "SourceInfo") -> bool:
        """Whether both are the same dataset, regardless of its path."""
        same_size = (self.language, self.documents, self.tokens) == (other.language, other.documents, other.tokens)
        if self.checksum and other.checksum:
            return same_size and self.checksum == other.checksum
        return same_size and (self.digest == other.digest or self.path == other.path)


@dataclass(frozen=True)
class Blend:
    """The sources of a run from a start position on."""

    start: int
    """First position of the run that uses this blend."""
    sources: tuple[SourceInfo, ...]
    """Sources in the recipe's order."""
    dropped: tuple[SourceInfo, ...] = ()
    """Sources of earlier blends; if added again, they continue where they stopped."""

    def to_dict(self, consumed: Sequence[int]) -> dict[str, Any]:
        """Returns plain values for `state.json`.

        Args:
            consumed: Number of samples consumed so far from each of `sources`.
        """
        return {
            "start": self.start,
            "consumed_at_start": {str(source.key): source.consumed_at_start for source in self.sources},
            "consumed": {str(source.key): int(count) for source, count in zip(self.sources, consumed, strict=True)},
            "sources": [_source_dict(source) for source in self.sources],
            "dropped": [
                {**_source_dict(source), "consumed_at_start": source.consumed_at_start} for source in self.dropped
            ],
        }


@dataclass(frozen=True)
class SavedBlend:
    """The blend of a checkpoint and its position in the run."""

    checkpoint: Path
    """Directory of the checkpoint, for messages."""
    blend: Blend
    position: int
    """Number of samples of the run consumed so far."""
    consumed: tuple[int, ...]
    """Number of samples consumed from each source of the blend, including those in earlier blends."""

    @classmethod
    def from_state(cls, checkpoint: Path, summary: Mapping[str, Any]) -> "SavedBlend":
        """Reads the blend from the state of a checkpoint.

        Args:
            checkpoint: Directory of the checkpoint.
            summary: Content of its `state.json`.

        Raises:
            ValueError: The state is corrupt.
        """
        values = summary.get("blend")
        if not isinstance(values, dict):
            raise ValueError(f"blend is {values!r}, expected an object")
        try:
            start, at_start, consumed = values["start"], values["consumed_at_start"], values["consumed"]
            sources = tuple(
                _parse_source({**source, "consumed_at_start": at_start[str(source["key"])]})
                for source in values["sources"]
            )
            dropped = tuple(_parse_source(source) for source in values["dropped"])
            counts = tuple(consumed[str(source.key)] for source in sources)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"blend is corrupt ({type(error).__name__}: {error})") from error
        position = summary["train_state"]["consumed_samples"]
        _check_counts(start, position, sources, dropped, counts)
        return cls(checkpoint, Blend(start, sources, dropped), position, counts)


def initial_blend(
    opened: Sequence[OpenSource], weights: Sequence[float], seq_length: int, digests: Sequence[str]
) -> Blend:
    """Returns the blend of a new run.

    Args:
        opened: The sources in the recipe's order.
        weights: Their weights.
        seq_length: Number of tokens of a sample.
        digests: Hash of the sequence lengths of each source.
    """
    return Blend(
        0,
        tuple(
            source_info(source, weight, seq_length, digest, key=number)
            for number, (source, weight, digest) in enumerate(zip(opened, weights, digests, strict=True))
        ),
    )


def source_info(source: OpenSource, weight: float, seq_length: int, digest: str, *, key: int) -> SourceInfo:
    """Returns the info of an opened source with no consumed samples."""
    tokens = source.tokens
    return SourceInfo(
        key=key,
        path=source.path,
        language=source.language,
        weight=float(weight),
        documents=source.sidecar.documents,
        tokens=source.sidecar.tokens,
        training_documents=int(np.searchsorted(source.dataset.document_indices, source.stop)),
        training_tokens=tokens,
        digest=digest,
        checksum=source.sidecar.checksums.get("bin", ""),
        samples_per_epoch=(tokens - 1) // seq_length,
        consumed_at_start=0,
    )


def resume_blend(saved: SavedBlend, fresh: Blend) -> Blend:
    """Returns the blend of a resumed run: the saved one or, if sources or weights changed, one that starts here.

    Args:
        saved: Blend of the checkpoint.
        fresh: `initial_blend` of the recipe's sources.

    Raises:
        UserError: The content of a source has changed.
    """
    before, checkpoint = saved.blend, saved.checkpoint
    # Sources with their current counts: those of the last blend, then those of earlier ones.
    known = [
        *(
            replace(source, consumed_at_start=count)
            for source, count in zip(before.sources, saved.consumed, strict=True)
        ),
        *before.dropped,
    ]
    matches = _match(known, fresh.sources)
    _check_unchanged(known, fresh.sources, matches, checkpoint)
    _warn_moved(known, fresh.sources, matches, checkpoint)
    unchanged = list(matches) == list(range(len(before.sources))) and all(
        source.weight == now.weight for source, now in zip(before.sources, fresh.sources, strict=True)
    )
    if unchanged:
        pairs = zip(before.sources, fresh.sources, strict=True)
        return replace(before, sources=tuple(replace(source, path=now.path) for source, now in pairs))
    next_key = max((source.key for source in known), default=-1) + 1
    sources: list[SourceInfo] = []
    for now, match in zip(fresh.sources, matches, strict=True):
        if match is None:
            sources.append(replace(now, key=next_key))
            next_key += 1
        else:
            sources.append(replace(known[match], path=now.path, weight=now.weight))
    dropped = [source for number, source in enumerate(known) if number not in matches]
    blend = Blend(saved.position, tuple(sources), tuple(dropped))
    _log_changes(before, blend, checkpoint)
    return blend


def _match(known: Sequence[SourceInfo], fresh: Sequence[SourceInfo]) -> list[int | None]:
    """Index of the known source with the content of each source of the recipe, or None. Equal paths match first."""
    matches: list[int | None] = [None] * len(fresh)
    unmatched = set(range(len(known)))
    for same_path in (True, False):
        for number, now in enumerate(fresh):
            if matches[number] is not None:
                continue
            for candidate in sorted(unmatched):
                if known[candidate].same_content(now) and (not same_path or known[candidate].path == now.path):
                    matches[number] = candidate
                    unmatched.remove(candidate)
                    break
    return matches


def _check_unchanged(
    known: Sequence[SourceInfo], fresh: Sequence[SourceInfo], matches: Sequence[int | None], checkpoint: Path
) -> None:
    """Rejects sources whose content has changed: they would repeat some samples and skip others."""
    by_path = {source.path: source for number, source in enumerate(known) if number not in matches}
    for now, match in zip(fresh, matches, strict=True):
        before = by_path.get(now.path) if match is None else known[match]
        if before is None or (match is not None and before.digest == now.digest):
            continue
        held_out = (before.training_documents, before.training_tokens) != (now.training_documents, now.training_tokens)
        if match is not None and held_out:
            got = f"{now.training_documents:,} training documents and {now.training_tokens:,} tokens"
            expected = f"{before.training_documents:,} and {before.training_tokens:,}"
            advice = "restore the previous data.validation_fraction and data.validation"
        else:
            got = f"{now.documents:,} documents and {now.tokens:,} tokens in {now.language}"
            expected = f"{before.documents:,} and {before.tokens:,} in {before.language}"
            if (before.documents, before.tokens, before.language) == (now.documents, now.tokens, now.language):
                expected += " with other content"
            advice = "restore the dataset, or move the new one to another path, where it counts as a new source"
        raise UserError(
            f"cannot resume from {checkpoint}: {now.path} changed after {before.consumed_at_start:,} of its samples "
            f"were read (got {got}, expected {expected}): samples would be repeated or skipped; {advice}, or {NEW_RUN}"
        )


def _warn_moved(
    known: Sequence[SourceInfo], fresh: Sequence[SourceInfo], matches: Sequence[int | None], checkpoint: Path
) -> None:
    moved = [
        f"{known[match].path} to {now.path}"
        for now, match in zip(fresh, matches, strict=True)
        if match is not None and known[match].path != now.path
    ]
    if moved:
        warn_on_rank_zero(
            logger,
            "data.sources moved since %s was saved, identified by their content: %s",
            checkpoint,
            ", ".join(moved),
        )


def _log_changes(before: Blend, now: Blend, checkpoint: Path) -> None:
    """Logs the weight and consumed samples of each source, and one more line for each dropped source."""
    earlier = {source.key: source for source in before.sources}
    parts = []
    for source in now.sources:
        old = earlier.get(source.key)
        change = f"weight {source.weight:g}" if old is None else f"weight {old.weight:g} -> {source.weight:g}"
        new = ", new" if old is None and source.consumed_at_start == 0 else ""
        parts.append(f"{source.path} ({change}, {source.consumed_at_start:,} samples consumed{new})")
    warn_on_rank_zero(
        logger,
        "the blend changed since %s was saved; from sample %s on, each source continues where it stopped: %s",
        checkpoint,
        f"{now.start:,}",
        ", ".join(parts),
    )
    for source in now.dropped:
        if source.key in earlier:
            remaining = -source.consumed_at_start % source.samples_per_epoch
            warn_on_rank_zero(
                logger,
                "%s is no longer in data.sources: %s of its %s samples in the current epoch were not consumed",
                source.path,
                f"{remaining:,}",
                f"{source.samples_per_epoch:,}",
            )


def _source_dict(source: SourceInfo) -> dict[str, Any]:
    values = asdict(source)
    del values["consumed_at_start"]
    return values


def _parse_source(values: Mapping[str, Any]) -> SourceInfo:
    source = SourceInfo(**values)
    for item in fields(SourceInfo):
        value = getattr(source, item.name)
        number = item.type in (int, float)
        if type(value) is not item.type and not (item.type is float and type(value) is int):
            raise ValueError(f"blend.sources: {item.name} is {value!r}, expected {item.type}")
        if number and value < 0:
            raise ValueError(f"blend.sources: {item.name} is {value!r}, expected 0 or more")
    if source.samples_per_epoch == 0:
        raise ValueError(f"blend.sources: samples_per_epoch of {source.path} is 0")
    return source


def _check_counts(
    start: Any, position: Any, sources: Sequence[SourceInfo], dropped: Sequence[SourceInfo], consumed: Sequence[Any]
) -> None:
    """Checks that the counts of a checkpoint add up: every sample came from exactly one source."""
    if not all(type(count) is int and count >= 0 for count in (start, position, *consumed)):
        raise ValueError(f"blend counts must be integers >= 0, got start {start!r}, consumed {list(consumed)!r}")
    before = sum(source.consumed_at_start for source in dropped)
    at_start = sum(source.consumed_at_start for source in sources) + before
    now = sum(consumed) + before
    if (at_start, now) != (start, position) or start > position:
        raise ValueError(
            f"blend counts do not add up: its sources provided {at_start} of the {start} samples before its start and "
            f"{now} of {position} so far"
        )
    keys = [source.key for source in (*sources, *dropped)]
    if len(set(keys)) != len(keys) or any(
        count < source.consumed_at_start for source, count in zip(sources, consumed, strict=True)
    ):
        raise ValueError("blend lists a source twice, or one with fewer samples consumed than at its start")

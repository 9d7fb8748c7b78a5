"""Which samples of which source a run has had: what lets a run go on with other weights or sources, and no sample come
again before its source is through.

A blend begins at a position of the run. From there on its weights decide which source gives the next sample, and each
source gives them in its own order, going on where it stood. A run that never changes has one blend, from position 0.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prealign.data.sources import OpenSource
from megatron_prealign.errors import UserError
from megatron_prealign.runtime.log import warn_once

logger = logging.getLogger(__name__)

_NEW_RUN = "set checkpoint.directory (or logging.run_dir) to a new directory"


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One source of a blend: what tells it from others, and how far it was read."""

    key: int
    """Number of the source in its run, which decides its order; never given to another one."""
    path: str
    """Prefix of its files when it was last opened; they may move."""
    language: str
    """Language code."""
    weight: float
    """Its weight in the recipe."""
    documents: int
    """Documents of the whole dataset."""
    tokens: int
    """Tokens of the whole dataset."""
    training_documents: int
    """Documents that validation leaves to training."""
    training_tokens: int
    """Their tokens."""
    digest: str
    """Hash of the lengths of their sequences."""
    checksum: str
    """Of the tokens' file, as the sidecar has it; empty if it has none."""
    samples_per_epoch: int
    """Samples before the first comes again."""
    consumed_at_start: int
    """Samples it had given when the blend began."""

    def same_content(self, other: "SourceInfo") -> bool:
        """Whether both are one dataset, wherever it lies."""
        alike = (self.language, self.documents, self.tokens) == (other.language, other.documents, other.tokens)
        if self.checksum and other.checksum:
            return alike and self.checksum == other.checksum
        return alike and (self.digest == other.digest or self.path == other.path)


@dataclass(frozen=True)
class Blend:
    """The sources of a run from one position on."""

    start: int
    """First position of the run that it decides."""
    sources: tuple[SourceInfo, ...]
    """In the recipe's order."""
    dropped: tuple[SourceInfo, ...] = ()
    """Sources of earlier blends, which may come back: they go on where they stood."""

    def to_dict(self, consumed: Sequence[int]) -> dict[str, Any]:
        """Plain values for `state.json`.

        Args:
            consumed: Samples that each of `sources` has given so far.
        """
        return {
            "start": self.start,
            "consumed_at_start": {str(source.key): source.consumed_at_start for source in self.sources},
            "consumed": {str(source.key): int(count) for source, count in zip(self.sources, consumed, strict=True)},
            "sources": [_facts(source) for source in self.sources],
            "dropped": [{**_facts(source), "consumed_at_start": source.consumed_at_start} for source in self.dropped],
        }


@dataclass(frozen=True)
class SavedBlend:
    """The blend of a checkpoint, and how far its run was."""

    checkpoint: Path
    """For messages."""
    blend: Blend
    position: int
    """Rows of the run consumed so far."""
    consumed: tuple[int, ...]
    """Of them from each source of the blend, those of earlier blends included."""

    @classmethod
    def from_state(cls, checkpoint: Path, summary: Mapping[str, Any]) -> "SavedBlend":
        """What a checkpoint of a run says.

        Args:
            checkpoint: Its directory.
            summary: Its `state.json`.

        Raises:
            ValueError: it is damaged.
        """
        values = summary.get("blend")
        if not isinstance(values, dict):
            raise ValueError(f"blend is {values!r}, expected an object")
        try:
            start, at_start, consumed = values["start"], values["consumed_at_start"], values["consumed"]
            sources = tuple(
                _source({**facts, "consumed_at_start": at_start[str(facts["key"])]}) for facts in values["sources"]
            )
            dropped = tuple(_source(facts) for facts in values["dropped"])
            counts = tuple(consumed[str(source.key)] for source in sources)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"blend is damaged ({type(error).__name__}: {error})") from error
        position = summary["train_state"]["consumed_samples"]
        _check_counts(start, position, sources, dropped, counts)
        return cls(checkpoint, Blend(start, sources, dropped), position, counts)


def first_blend(
    opened: Sequence[OpenSource], weights: Sequence[float], seq_length: int, digests: Sequence[str]
) -> Blend:
    """The blend of a run that begins.

    Args:
        opened: The sources in the recipe's order.
        weights: Their weights.
        seq_length: Tokens of a sample.
        digests: Hash of each source's sequence lengths.
    """
    return Blend(
        0,
        tuple(
            source_info(source, weight, seq_length, digest, key=number)
            for number, (source, weight, digest) in enumerate(zip(opened, weights, digests, strict=True))
        ),
    )


def source_info(source: OpenSource, weight: float, seq_length: int, digest: str, *, key: int) -> SourceInfo:
    """What a blend keeps of an opened source, of which nothing has been read."""
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


def continue_blend(saved: SavedBlend, fresh: Blend) -> Blend:
    """The blend of a run that goes on: the saved one, or one that begins here and leaves nothing out.

    Args:
        saved: What the checkpoint says.
        fresh: `first_blend` of the recipe's sources.

    Raises:
        UserError: a source is not what it was.
    """
    before, checkpoint = saved.blend, saved.checkpoint
    # The sources as they stand now, those of earlier blends behind those of the last one.
    known = [
        *(
            replace(source, consumed_at_start=count)
            for source, count in zip(before.sources, saved.consumed, strict=True)
        ),
        *before.dropped,
    ]
    partners = _match(known, fresh.sources)
    _refuse_changed(known, fresh.sources, partners, checkpoint)
    _warn_of_moves(known, fresh.sources, partners, checkpoint)
    unchanged = list(partners) == list(range(len(before.sources))) and all(
        source.weight == now.weight for source, now in zip(before.sources, fresh.sources, strict=True)
    )
    if unchanged:
        moved = zip(before.sources, fresh.sources, strict=True)
        return replace(before, sources=tuple(replace(source, path=now.path) for source, now in moved))
    next_key = max((source.key for source in known), default=-1) + 1
    sources: list[SourceInfo] = []
    for now, partner in zip(fresh.sources, partners, strict=True):
        if partner is None:
            sources.append(replace(now, key=next_key))
            next_key += 1
        else:
            sources.append(replace(known[partner], path=now.path, weight=now.weight))
    dropped = [source for number, source in enumerate(known) if number not in partners]
    blend = Blend(saved.position, tuple(sources), tuple(dropped))
    _tell(before, blend, checkpoint)
    return blend


def _match(known: Sequence[SourceInfo], fresh: Sequence[SourceInfo]) -> list[int | None]:
    """For each source of the recipe the known one that it is."""
    partners: list[int | None] = [None] * len(fresh)
    free = set(range(len(known)))
    for same_path in (True, False):
        for number, now in enumerate(fresh):
            if partners[number] is not None:
                continue
            for candidate in sorted(free):
                if known[candidate].same_content(now) and (not same_path or known[candidate].path == now.path):
                    partners[number] = candidate
                    free.remove(candidate)
                    break
    return partners


def _refuse_changed(
    known: Sequence[SourceInfo], fresh: Sequence[SourceInfo], partners: Sequence[int | None], checkpoint: Path
) -> None:
    """A source that is not what it was would repeat some samples and skip others."""
    by_path = {source.path: source for number, source in enumerate(known) if number not in partners}
    for now, partner in zip(fresh, partners, strict=True):
        before = by_path.get(now.path) if partner is None else known[partner]
        if before is None or (partner is not None and before.digest == now.digest):
            continue
        held_out = (before.training_documents, before.training_tokens) != (now.training_documents, now.training_tokens)
        if partner is not None and held_out:
            was = f"{before.training_documents:,} documents and {before.training_tokens:,} tokens"
            got = f"leaves to training {now.training_documents:,} and {now.training_tokens:,}"
            advice = "set data.validation_fraction and data.validation as they were"
        else:
            was = f"{before.documents:,} documents and {before.tokens:,} tokens in {before.language}"
            got = f"holds {now.documents:,} and {now.tokens:,} in {now.language}"
            if (before.documents, before.tokens, before.language) == (now.documents, now.tokens, now.language):
                got += " of other text"
            advice = "restore the dataset, or put the new one at another path, where it counts as a source of its own"
        raise UserError(
            f"{checkpoint} cannot go on with {now.path}, of which {before.consumed_at_start:,} samples were read: it "
            f"{got}, expected {was}, and samples would be repeated or skipped; {advice}, or {_NEW_RUN}"
        )


def _warn_of_moves(
    known: Sequence[SourceInfo], fresh: Sequence[SourceInfo], partners: Sequence[int | None], checkpoint: Path
) -> None:
    moved = [
        f"{known[partner].path} to {now.path}"
        for now, partner in zip(fresh, partners, strict=True)
        if partner is not None and known[partner].path != now.path
    ]
    if moved:
        warn_once(
            logger,
            "data.sources moved since %s was saved, known again by what they hold: %s",
            checkpoint,
            ", ".join(moved),
        )


def _tell(before: Blend, now: Blend, checkpoint: Path) -> None:
    """One line of what each source has given; one more for each that is dropped."""
    earlier = {source.key: source for source in before.sources}
    parts = []
    for source in now.sources:
        old = earlier.get(source.key)
        change = f"weight {source.weight:g}" if old is None else f"weight {old.weight:g} -> {source.weight:g}"
        new = ", new" if old is None and source.consumed_at_start == 0 else ""
        parts.append(f"{source.path} ({change}, {source.consumed_at_start:,} samples consumed{new})")
    warn_once(
        logger,
        "the blend changed since %s was saved, from sample %s on each source goes on where it stood: %s",
        checkpoint,
        f"{now.start:,}",
        ", ".join(parts),
    )
    for source in now.dropped:
        if source.key in earlier:
            rest = -source.consumed_at_start % source.samples_per_epoch
            warn_once(
                logger,
                "%s is no longer in data.sources: %s of its %s samples were not read in the epoch that it was in",
                source.path,
                f"{rest:,}",
                f"{source.samples_per_epoch:,}",
            )


def _facts(source: SourceInfo) -> dict[str, Any]:
    values = asdict(source)
    del values["consumed_at_start"]
    return values


def _source(values: Mapping[str, Any]) -> SourceInfo:
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
    """The counts of a checkpoint must add up: each row came from one source."""
    if not all(type(count) is int and count >= 0 for count in (start, position, *consumed)):
        raise ValueError(f"blend holds counts that are no numbers from 0: start {start!r}, consumed {list(consumed)!r}")
    before = sum(source.consumed_at_start for source in dropped)
    at_start = sum(source.consumed_at_start for source in sources) + before
    now = sum(consumed) + before
    if (at_start, now) != (start, position) or start > position:
        raise ValueError(
            f"blend does not add up: its sources gave {at_start} of the {start} samples before it and {now} of "
            f"{position} so far"
        )
    keys = [source.key for source in (*sources, *dropped)]
    if len(set(keys)) != len(keys) or any(
        count < source.consumed_at_start for source, count in zip(sources, consumed, strict=True)
    ):
        raise ValueError("blend names a source twice, or one that gave fewer samples than before it began")

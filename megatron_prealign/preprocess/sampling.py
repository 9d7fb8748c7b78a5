"""A corpus of several languages, and a sample of it in which no language drowns."""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_prealign.corpus.inputs import Input, resolve_each, split_language
from megatron_prealign.corpus.read_errors import OnError, Problems
from megatron_prealign.corpus.readers import read_documents
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress

UNNAMED = "und"
"""The language of inputs without one: undetermined, as ISO 639 calls it."""
HELD_OUT_BYTES = 1_000_000
"""Most text of a language that is kept to measure on."""
_MASK = (1 << 64) - 1


@dataclass
class TextCount:
    """What a language has."""

    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the texts."""


@dataclass(frozen=True)
class Share:
    """Which documents of a language are drawn."""

    language: str
    part: float
    """Its share of the sample in bytes."""
    times: float
    """How often a document is drawn on average: 0.25 is every fourth, 2.5 is two or three times each."""
    block: int
    """Of so many documents in a row one, at a random place, is kept to measure on."""
    held_out: bool
    """Whether what is measured on is left out of the sample; too short texts have nothing to spare."""


@dataclass(frozen=True)
class Drawn:
    """A document and what it is for."""

    language: str
    text: str
    where: str
    copies: int
    """How often it is in the sample; 0 for most documents of a large corpus."""
    measured: bool
    """Whether it is measured on."""


@dataclass
class Corpus:
    """Inputs with their languages, read as often as needed."""

    inputs: list[tuple[Input, str]]
    text_keys: Sequence[str]
    on_error: OnError
    problems: Problems = field(default_factory=Problems)
    """What the first reading passed over."""

    @classmethod
    def open(cls, texts: Sequence[str | Path], text_keys: Sequence[str], on_error: OnError) -> "Corpus":
        """Takes inputs as `resolve_inputs` does, each with `:LANGUAGE` behind it or without.

        Raises:
            UserError: as `resolve_inputs`.
        """
        parts = [split_language(str(text)) for text in texts]
        found = resolve_each([name for name, _ in parts])
        inputs = [
            (one, language or UNNAMED) for (_, language), group in zip(parts, found, strict=True) for one in group
        ]
        return cls(inputs, text_keys, on_error)

    @property
    def languages(self) -> list[str]:
        """Every language once, in the order of the inputs."""
        return list(dict.fromkeys(language for _, language in self.inputs))

    def count(self, show_progress: bool) -> dict[str, TextCount]:
        """Reads everything once.

        Raises:
            ReadError: something bad with `on_error="stop"`.
            UserError: a language without a document that has text.
        """
        counts = {language: TextCount() for language in self.languages}
        for language, text, _ in self._documents("count text", self.problems, show_progress):
            counts[language].documents += 1
            counts[language].bytes += len(text.encode("utf-8"))
        for language, count in counts.items():
            if not count.documents:
                names = [one.name for one, other in self.inputs if other == language]
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise UserError(
                    f"no text in {shown} ({self.problems.count} documents or files skipped in all); expected at least "
                    "one document that is not empty, leave these inputs out"
                )
        return counts

    def draw(self, shares: dict[str, Share], seed: int, show_progress: bool) -> Iterator[Drawn]:
        """Reads everything again and gives the documents that are drawn.

        A draw depends on the seed, the language and the number of the document in its language alone.
        """
        numbers = dict.fromkeys(shares, 0)
        keys = {language: _mix(seed ^ zlib.crc32(language.encode("utf-8")) << 32) for language in shares}
        # The first reading has told of all that is wrong.
        for language, text, where in self._documents("draw text", Problems(), show_progress):
            share, number = shares[language], numbers[language]
            numbers[language] += 1
            block, place = divmod(number, share.block)
            measured = _mix(keys[language] ^ 1 ^ block << 1) % share.block == place
            copies = 0
            if not (measured and share.held_out):
                rest, whole = math.modf(share.times)
                copies = int(whole) + (_mix(keys[language] + (number << 1)) < rest * 2.0**64)
            if copies or measured:
                yield Drawn(language, text, where, copies, measured)

    def _documents(self, action: str, problems: Problems, show_progress: bool) -> Iterator[tuple[str, str, str]]:
        with Progress(action, unit="documents", enabled=show_progress) as progress:
            for one, language in self.inputs:
                for text, where in read_documents([one], self.text_keys, self.on_error, problems):
                    progress.update()
                    yield language, text, where


def plan_shares(
    counts: dict[str, TextCount], temperature: float, sample_bytes: int, held_out: float
) -> dict[str, Share]:
    """How much of every language is drawn.

    The share of a language is in proportion to its bytes that are not held out, to the power of 1 / `temperature`: 1
    leaves the languages as they are, larger numbers make them more alike. A language that has less text than its share
    is read several times.

    Args:
        counts: what there is, for each language.
        temperature: above 0.
        sample_bytes: bytes of the sample; never more than there is text.
        held_out: share of the documents that is kept to measure on, from 0 to 0.5; of each language at most
            `HELD_OUT_BYTES`.
    """
    blocks: dict[str, int] = {}
    spared: dict[str, bool] = {}
    left: dict[str, float] = {}
    for language, count in counts.items():
        fewest = math.ceil(count.bytes / HELD_OUT_BYTES)
        block = max(fewest, round(1 / held_out)) if held_out else fewest
        # Two such documents, or it is no measurement.
        spared[language] = held_out > 0 and count.documents >= 2 * block
        blocks[language] = block if spared[language] else min(fewest, count.documents)
        left[language] = count.bytes * (1 - 1 / block) if spared[language] else float(count.bytes)
    weights = {language: math.log(size) / temperature for language, size in left.items()}
    largest = max(weights.values())
    parts = {language: math.exp(weight - largest) for language, weight in weights.items()}
    total_part = sum(parts.values())
    budget = min(float(sample_bytes), sum(left.values()))
    shares = {}
    for language in counts:
        part = parts[language] / total_part
        times = budget * part / left[language]
        # All of it is all of it, whatever the last bit of the division says.
        times = float(round(times)) if abs(times - round(times)) < 1e-9 else times
        shares[language] = Share(language, part, times, blocks[language], spared[language])
    return shares


def _mix(value: int) -> int:
    """64 random-looking bits of a number (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31

"""Samples documents from a multilingual corpus, with temperature-based balancing of the languages."""

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

UNDETERMINED = "und"
"""Language of inputs without one: ISO 639 code for undetermined."""
HELD_OUT_BYTES = 1_000_000
"""Maximum held-out text per language."""
_MASK = (1 << 64) - 1


@dataclass
class TextCount:
    """Size of the text of a language."""

    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the texts."""


@dataclass(frozen=True)
class LanguageSampling:
    """How the documents of a language are sampled."""

    language: str
    fraction: float
    """Fraction of the sample, in bytes."""
    times: float
    """Average number of times a document is sampled: 0.25 is every fourth, 2.5 is two or three times each."""
    block: int
    """Number of consecutive documents of which one, at a random position, is used to measure fertility."""
    held_out: bool
    """Whether these documents are excluded from the sample; not if the language has too few documents."""


@dataclass(frozen=True)
class SampledDocument:
    """A document for training, for measuring fertility, or both."""

    language: str
    text: str
    where: str
    copies: int
    """Number of times it is in the sample; 0 for most documents of a large corpus."""
    measured: bool
    """Whether fertility is measured on it."""


@dataclass
class Corpus:
    """Inputs with their languages; can be read several times."""

    inputs: list[tuple[Input, str]]
    text_keys: Sequence[str]
    on_error: OnError
    problems: Problems = field(default_factory=Problems)
    """Documents and files skipped in the first pass."""

    @classmethod
    def open(cls, texts: Sequence[str | Path], text_keys: Sequence[str], on_error: OnError) -> "Corpus":
        """Resolves inputs like `resolve_inputs`, each with an optional suffix `:LANGUAGE`.

        Raises:
            UserError: see `resolve_inputs`.
        """
        parts = [split_language(str(text)) for text in texts]
        groups = resolve_each([name for name, _ in parts])
        inputs = [
            (one, language or UNDETERMINED) for (_, language), group in zip(parts, groups, strict=True) for one in group
        ]
        return cls(inputs, text_keys, on_error)

    @property
    def languages(self) -> list[str]:
        """All languages, in the order of the inputs."""
        return list(dict.fromkeys(language for _, language in self.inputs))

    def count(self, show_progress: bool) -> dict[str, TextCount]:
        """Counts the documents and bytes of every language in one pass.

        Raises:
            ReadError: a bad document or file with `on_error="stop"`.
            UserError: a language has no text.
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
                    f"no text in {shown} ({self.problems.count} documents or files skipped in total), expected at "
                    "least one non-empty document; remove these inputs"
                )
        return counts

    def sample(
        self, sampling: dict[str, LanguageSampling], seed: int, show_progress: bool
    ) -> Iterator[SampledDocument]:
        """Yields the sampled documents in a second pass.

        Whether a document is sampled depends only on the seed, its language and its index within the language.
        """
        numbers = dict.fromkeys(sampling, 0)
        keys = {language: _mix(seed ^ zlib.crc32(language.encode("utf-8")) << 32) for language in sampling}
        # The first pass has recorded all problems.
        for language, text, where in self._documents("sample text", Problems(), show_progress):
            rule, number = sampling[language], numbers[language]
            numbers[language] += 1
            block, position = divmod(number, rule.block)
            measured = _mix(keys[language] ^ 1 ^ block << 1) % rule.block == position
            copies = 0
            if not (measured and rule.held_out):
                fractional, integer = math.modf(rule.times)
                copies = int(integer) + (_mix(keys[language] + (number << 1)) < fractional * 2.0**64)
            if copies or measured:
                yield SampledDocument(language, text, where, copies, measured)

    def _documents(self, action: str, problems: Problems, show_progress: bool) -> Iterator[tuple[str, str, str]]:
        with Progress(action, unit="documents", enabled=show_progress) as progress:
            for one, language in self.inputs:
                for text, where in read_documents([one], self.text_keys, self.on_error, problems):
                    progress.update()
                    yield language, text, where


def plan_sampling(
    counts: dict[str, TextCount], temperature: float, sample_bytes: int, held_out: float
) -> dict[str, LanguageSampling]:
    """Computes how much text of every language is sampled.

    The fraction of a language is proportional to its bytes that are not held out, to the power of 1 / `temperature`: 1
    keeps the natural proportions, larger values make the languages more equal. Documents of a language with less text
    than its fraction are repeated.

    Args:
        counts: text size per language.
        temperature: above 0.
        sample_bytes: size of the sample; limited to the size of the text.
        held_out: fraction of the documents held out for measuring, from 0 to 0.5; at most `HELD_OUT_BYTES` per
            language.
    """
    blocks: dict[str, int] = {}
    has_held_out: dict[str, bool] = {}
    remaining: dict[str, float] = {}
    for language, count in counts.items():
        smallest = math.ceil(count.bytes / HELD_OUT_BYTES)
        block = max(smallest, round(1 / held_out)) if held_out else smallest
        # Measuring on fewer than two held-out documents is meaningless.
        has_held_out[language] = held_out > 0 and count.documents >= 2 * block
        blocks[language] = block if has_held_out[language] else min(smallest, count.documents)
        remaining[language] = count.bytes * (1 - 1 / block) if has_held_out[language] else float(count.bytes)
    logits = {language: math.log(size) / temperature for language, size in remaining.items()}
    largest = max(logits.values())
    weights = {language: math.exp(logit - largest) for language, logit in logits.items()}
    total_weight = sum(weights.values())
    budget = min(float(sample_bytes), sum(remaining.values()))
    sampling = {}
    for language in counts:
        fraction = weights[language] / total_weight
        times = budget * fraction / remaining[language]
        # Rounding errors must not drop or repeat documents of a language that is sampled completely.
        times = float(round(times)) if abs(times - round(times)) < 1e-9 else times
        sampling[language] = LanguageSampling(language, fraction, times, blocks[language], has_held_out[language])
    return sampling


def _mix(value: int) -> int:
    """Hashes an integer to 64 pseudo-random bits (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31

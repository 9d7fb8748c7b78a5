"""Random code-switching cases, and checks of an implementation against the oracle and general properties."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies

from megatron_prealign.kernels import (
    LABEL_MODES,
    CodeSwitchBatch,
    CodeSwitchOutput,
    CodeSwitchSettings,
    build_ngram_table,
    code_switch_reference,
    ratio_threshold,
)
from megatron_prealign.kernels._triton import INTERPRETED, runs_triton, triton_version
from megatron_prealign.kernels.code_switch import LaunchShape, launch_code_switch
from support.code_switch_oracle import Dictionary, switch_row

EOD = 0
Implementation = Callable[..., CodeSwitchOutput]

if INTERPRETED and triton_version() < (3, 4):
    # 3.2 stores 8 bytes of a 4-byte value returned by a scan, 3.3 fails on a tuple returned by a device function
    pytest.skip("the interpreters of triton 3.2 and 3.3 cannot run these kernels", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small blocks, so that a short sequence has many and state is carried from one to the next.
BLOCK = 16 if INTERPRETED else 32
IMPLEMENTATIONS: dict[str, Implementation] = {"reference": code_switch_reference}
if runs_triton(torch.device(DEVICE)):
    small = LaunchShape(BLOCK, 1)
    IMPLEMENTATIONS = {
        f"{form}_kernel": partial(launch_code_switch, form=form, shape=small) for form in ("row", "blocks")
    }
if DEVICE == "cuda":
    # launch configuration of training
    IMPLEMENTATIONS |= {f"{form}_launched": partial(launch_code_switch, form=form) for form in ("row", "blocks")}


@dataclass(frozen=True)
class Case:
    """A batch, a dictionary and settings, all in plain Python."""

    rows: list[list[int]]
    dictionary: Dictionary
    settings: dict[str, Any]
    language: list[int] | None = None
    sample_id: list[int] | None = None
    thresholds: list[list[int]] | None = None
    word_starts: list[list[bool]] | None = None
    dtype: torch.dtype = torch.int64
    device: str = "cpu"

    def arguments(self) -> dict[str, Any]:
        """Arguments of an implementation."""
        languages = len(self.dictionary.language_weights)
        device = self.device
        thresholds = self.thresholds or [[1 << 32] * languages] * languages
        starts = None if self.word_starts is None else torch.tensor(self.word_starts, device=device)
        return {
            "batch": CodeSwitchBatch(
                tokens=torch.tensor(self.rows, dtype=self.dtype, device=device),
                language=torch.tensor(self.language or [0] * len(self.rows), device=device),
                sample_id=torch.tensor(self.sample_id or list(range(len(self.rows))), device=device),
                word_starts=starts,
            ),
            "table": build_ngram_table(**self.dictionary.arrays(), device=device),
            "thresholds": torch.tensor(thresholds, dtype=torch.int64, device=device),
            "settings": self.all_settings(),
        }

    def all_settings(self) -> CodeSwitchSettings:
        defaults = {"seed": 7, "sequence_length": len(self.rows[0]) - 1, "label_mode": "input_only", "pad_id": EOD}
        return CodeSwitchSettings(**{**defaults, **self.settings})

    def but(self, **changes: Any) -> "Case":
        """The case with changed fields; names that are not fields change settings."""
        fields = {name: changes.pop(name) for name in list(changes) if name in self.__dataclass_fields__}
        return replace(self, settings={**self.settings, **changes}, **fields)

    def expected(self) -> dict[str, torch.Tensor]:
        """The oracle's outputs."""
        settings = self.all_settings()
        arguments = self.arguments()
        per_row = [
            switch_row(
                row,
                int(arguments["batch"].language[index]),
                int(arguments["batch"].sample_id[index]),
                self.dictionary,
                thresholds=arguments["thresholds"].tolist(),
                word_starts=None if self.word_starts is None else self.word_starts[index],
                **{name: value for name, value in asdict(settings).items() if name != "vocab_size"},
            )
            for index, row in enumerate(self.rows)
        ]
        return {name: torch.tensor([each[name] for each in per_row], device=self.device) for name in per_row[0]}


Run = Callable[[Case], CodeSwitchOutput]


def assert_equals_oracle(case: Case, implementation: Implementation) -> CodeSwitchOutput:
    """Compares every output exactly, checks the documented dtypes, and returns the implementation's output."""
    output = implementation(**case.arguments())
    expected = case.expected()
    assert (output.document_starts is None) == ("document_starts" not in expected)
    assert [each.dtype for each in output if each is not None] == [
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int64,
        *([torch.int32] if "document_starts" in expected else []),
        torch.int64,
    ]
    for name, values in expected.items():
        result = getattr(output, name)
        assert result.is_contiguous(), name
        assert torch.equal(result, values.to(result.dtype)), (name, result.tolist(), values.tolist())
    return output


def random_word(generator: np.random.Generator, flags: list[int], max_tokens: int) -> tuple[int, ...]:
    """A single word under the boundary rule: starts with a boundary, has none inside, may end with one."""

    def choose(first: bool, last: bool) -> int:
        allowed = [t for t, flag in enumerate(flags) if t != EOD and bool(flag & 1) == first and (last or not flag & 2)]
        return int(generator.choice(allowed))

    length = int(generator.integers(1, max_tokens + 1))
    return tuple(choose(place == 0, place == length - 1) for place in range(length))


def random_dictionary(
    generator: np.random.Generator, languages: int, letters: bool, longest_key: int, longest_candidate: int
) -> Dictionary:
    vocabulary = 40
    flags = generator.choice([0, 0, 1, 1, 2, 3], vocabulary)
    flags[:6] = [3, 1, 0, 1, 0, 2]
    if letters:
        flags |= generator.choice([0, 4], vocabulary, p=[0.3, 0.7])
        flags[EOD] = 3
    weights = [float(w) for w in generator.choice([0, 1, 2, 3], languages)]
    # a table needs a drawable candidate
    weights[1] = max(weights[1], 1.0)
    dictionary = Dictionary(flags.tolist(), weights, {(0, (1,)): [(1, (3,), 1.0)]}, forbidden=(EOD,))
    for _ in range(int(generator.integers(0, 60))):
        word = random_word(generator, dictionary.word_boundary, max_tokens=int(generator.integers(1, longest_key + 1)))
        dictionary.keys[int(generator.integers(0, 2)), word] = [
            (
                int(generator.integers(0, languages)),
                tuple(generator.integers(1, vocabulary, generator.integers(1, longest_candidate + 1)).tolist()),
                float(generator.integers(0, 4)),
            )
            for _ in range(int(generator.integers(1, 6)))
        ]
    dictionary.keys[0, (1,)] = [*dictionary.keys[0, (1,)], (1, (3,), 1.0)]
    return dictionary


def random_rows(
    generator: np.random.Generator, dictionary: Dictionary, row_languages: list[int], width: int
) -> list[list[int]]:
    """Rows of words of the dictionary and random tokens, truncated at both ends."""
    rows = []
    for language in row_languages:
        words = [word for key_language, word in dictionary.keys if key_language == language] or [(EOD,)]
        row: list[int] = []
        while len(row) < width + 8:
            known = generator.random() < 0.7
            row += words[generator.integers(len(words))] if known else generator.integers(0, 40, 2).tolist()
        cut = int(generator.integers(0, 8))
        rows.append(row[cut : cut + width])
    return rows


@strategies.composite
def cases(draw: Any, max_rows: int = 6, max_sequence: int = 64) -> Case:
    """Arbitrary cases. Hypothesis draws the kind of a case and a seed for its tokens."""
    integers, booleans = strategies.integers, strategies.booleans()
    generator = np.random.default_rng(draw(integers(0, 2**32 - 1)))
    languages = draw(integers(2, 5))
    longest_candidate = draw(strategies.sampled_from([1, 3, 3, 8, 60]))
    dictionary = random_dictionary(generator, languages, draw(booleans), draw(integers(1, 8)), longest_candidate)
    count, sequence = draw(integers(1, max_rows)), draw(integers(1, max_sequence))
    width = sequence + 1 + draw(strategies.sampled_from([0, 0, 1, 7, sequence]))
    row_languages = generator.choice([-1, 0, 1], count, p=[0.1, 0.45, 0.45]).tolist()
    rows = random_rows(generator, dictionary, row_languages, width)
    ratios = generator.choice([0.0, 0.3, 1.0], (languages, languages), p=[0.1, 0.3, 0.6])
    return Case(
        rows=rows,
        dictionary=dictionary,
        language=row_languages,
        sample_id=generator.integers(-(1 << 63), 1 << 63, count).tolist(),
        thresholds=[[ratio_threshold(ratio) for ratio in line] for line in ratios],
        word_starts=(generator.random((count, width)) < 0.1).tolist() if draw(booleans) else None,
        dtype=draw(strategies.sampled_from([torch.int32, torch.int64])),
        settings={
            "seed": draw(integers(0, 2**64 - 1)),
            "sequence_length": sequence,
            "label_mode": draw(strategies.sampled_from(LABEL_MODES)),
            "pad_id": draw(strategies.sampled_from([EOD, 7])),
            "eod_id": EOD,
            "mask_eod": draw(booleans),
            "reset_at_eod": draw(booleans),
        },
    )


def assert_properties(case: Case, output: CodeSwitchOutput) -> int:
    """Checks properties of any case from its inputs and outputs only; returns the number of switched words."""
    settings, dictionary = case.all_settings(), case.dictionary
    arguments = case.arguments()
    weights = dictionary.language_weights
    switched = 0
    for index, row in enumerate(case.rows):
        tokens, labels, mask = (getattr(output, name)[index].tolist() for name in ("tokens", "labels", "loss_mask"))
        counts = output.counts[index].tolist()
        filled = settings.sequence_length - counts[3]
        assert tokens[filled:] == [settings.pad_id] * counts[3] and not any(mask[filled:])
        language = int(arguments["batch"].language[index])
        known = {
            key: {c[1] for c in candidates if c[2] > 0 and weights[c[0]] > 0}
            for (key_language, key), candidates in dictionary.keys.items()
            if key_language == language
        }
        assert counts[2] in _spans_switched(row, tokens[:filled], known)
        assert counts[2] == sum(counts[5:]) <= counts[1]
        # documents that reach the output are neither added nor removed
        ends = [token for token in row if token == EOD]
        assert [token for token in tokens[:filled] if token == EOD] == ends[: tokens[:filled].count(EOD)]
        scored = [label for label, weight in zip(labels, mask, strict=True) if weight]
        assert not any(label for label, weight in zip(labels, mask, strict=True) if not weight)
        if settings.label_mode in ("input_only", "no_predict"):
            assert _is_subsequence(scored, row)
        switched += counts[2]
    return switched


def _spans_switched(row: list[int], tokens: list[int], known: dict[tuple[int, ...], set[tuple[int, ...]]]) -> set[int]:
    """All possible numbers of switched words: over all ways to obtain `tokens` from the row by replacing words with
    listed translations. Empty if there is none."""
    # (source position, output position) -> possible numbers of switched words up to there
    states: dict[tuple[int, int], set[int]] = {(0, 0): {0}}
    possible: set[int] = set()
    while states:
        source, place = min(states)
        counts = states.pop((source, place))
        if place == len(tokens):
            possible |= counts
            continue
        if source == len(row):
            continue
        if row[source] == tokens[place]:
            states.setdefault((source + 1, place + 1), set()).update(counts)
        for length in range(1, min(8, len(row) - source) + 1):
            for translation in known.get(tuple(row[source : source + length]), ()):
                end = min(place + len(translation), len(tokens))
                if list(translation[: end - place]) == tokens[place:end]:
                    states.setdefault((source + length, end), set()).update(count + 1 for count in counts)
    return possible


def _is_subsequence(part: list[int], sequence: list[int]) -> bool:
    rest = iter(sequence)
    return all(any(each == other for other in rest) for each in part)


# tokens that start a word (1..9) and continue one (11..19); one key of every length from 1 to 9 tokens
EDGE_FLAGS = [3] + [1] * 10 + [0] * 10
CONTINUED = list(range(11, 19))


def edge(
    rows: list[list[int]],
    translation: tuple[int, ...] = (9,),
    length: int = 1,
    weights: tuple[float, ...] = (0.0, 1.0),
    **changes: object,
) -> Case:
    keys = {(0, (1, *CONTINUED[: length - 1])): [(1, translation, 1.0)]}
    return Case(rows, Dictionary(EDGE_FLAGS, list(weights), keys, (EOD,)), {}).but(**changes)


def mixed_case() -> Case:
    rows = [[1, 11, 12, 2, 1, 11, 12, 1, 3, 4] * 6 + [2] for _ in range(6)]
    keys = {(0, (1, 11, 12)): [(1, (9, 18), 1.0)], (0, (1,)): [(1, (8,), 1.0)]}
    dictionary = Dictionary(EDGE_FLAGS, [0.0, 1.0], keys)
    return Case(rows, dictionary, {"label_mode": "mix"}, sample_id=list(range(90, 96)), thresholds=[[0, 1 << 31]] * 2)

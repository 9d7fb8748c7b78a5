"""Code-switching in pure Python, one token after the other: slow, obvious, and sharing nothing with what it checks."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

Candidate = tuple[int, tuple[int, ...], float]
"""Target language, tokens, weight."""


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ k, y % 2**32, (x >> 32) ^ d ^ m, x % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


@dataclass
class Dictionary:
    """Keys (language, tokens) with their candidates, as a Python dict."""

    word_boundary: list[int]
    language_weights: list[float]
    keys: dict[tuple[int, tuple[int, ...]], list[Candidate]] = field(default_factory=dict)

    def arrays(self) -> dict:
        """The keyword arguments of build_ngram_table."""
        keys = list(self.keys)
        groups = [sorted(self.keys[key], key=lambda candidate: candidate[0]) for key in keys]
        candidates = [candidate for group in groups for candidate in group]

        def ragged(items: list, dtype: type) -> tuple[np.ndarray, np.ndarray]:
            flat = np.array([each for item in items for each in item], dtype=dtype)
            return flat, np.cumsum([0, *(len(item) for item in items)], dtype=np.int64)

        key_tokens, key_offsets = ragged([tokens for _, tokens in keys], np.int32)
        candidate_tokens, candidate_offsets = ragged([tokens for _, tokens, _ in candidates], np.int32)
        return {
            "word_boundary": np.array(self.word_boundary, dtype=np.uint8),
            "key_tokens": key_tokens,
            "key_offsets": key_offsets,
            "key_language": np.array([language for language, _ in keys], dtype=np.int16),
            "key_candidate_offsets": np.cumsum([0, *(len(group) for group in groups)], dtype=np.int64),
            "candidate_tokens": candidate_tokens,
            "candidate_offsets": candidate_offsets,
            "candidate_language": np.array([language for language, _, _ in candidates], dtype=np.int16),
            "candidate_weight": np.array([weight for _, _, weight in candidates], dtype=np.float32),
            "language_weights": self.language_weights,
        }


def choose(weights: list[float], random: int) -> int:
    total = sum(Fraction(weight) for weight in weights)
    running = Fraction(0)
    for index, weight in enumerate(weights):
        running += Fraction(weight)
        if random < math.floor(running / total * 2**32 + Fraction(1, 2)):
            return index
    raise AssertionError("the last bound is 2^32")


def words_of(row: list[int], flags: list[int]) -> list[tuple[int, int]]:
    """(start, end) of every word that both begins and ends inside the window."""
    starts = [i for i in range(len(row)) if (flags[row[i]] & 1) or (i > 0 and flags[row[i - 1]] & 2)]
    return list(zip(starts[:-1], starts[1:], strict=True))


def switch_row(
    row: list[int],
    language: int,
    sample_id: int,
    dictionary: Dictionary,
    *,
    seed: int,
    thresholds: list[int],
    label_mode: str,
    pad_id: int,
    eod_id: int | None,
) -> tuple[list[int], list[int], list[float], list[int]]:
    """tokens, labels, loss mask and counts of one row."""
    length = len(row) - 1
    flags, weights = dictionary.word_boundary, dictionary.language_weights
    counts = [0] * (3 + len(weights))
    letters = any(flag & 4 for flag in flags)
    replaced: dict[int, tuple[int, tuple[int, ...], int]] = {}
    for start, end in words_of(row, flags):
        if flags[row[start]] & 4 or not letters:
            counts[0] += 1
        candidates = [
            each
            for each in dictionary.keys.get((language, tuple(row[start:end])), [])
            if each[2] > 0 and weights[each[0]] > 0
        ]
        if not candidates:
            continue
        counts[1] += 1
        r0, r1, r2, r3 = philox((start, sample_id % 2**32, (sample_id >> 32) % 2**32, 0), (seed % 2**32, seed >> 32))
        languages = sorted({each[0] for each in candidates})
        target = languages[choose([weights[each] for each in languages], r1)]
        options = [each for each in candidates if each[0] == target]
        _, translation, _ = options[choose([each[2] for each in options], r2)]
        if r0 < thresholds[target]:
            counts[2] += 1
            counts[3 + target] += 1
            replaced[start] = (end, translation, r3)

    stream: list[tuple[int, int | None]] = []
    position = 0
    while position < len(row):
        if position not in replaced:
            stream.append((row[position], row[position]))
            position += 1
            continue
        end, translation, r3 = replaced[position]
        mode = label_mode
        if mode == "mix":
            mode = "codeswitch" if r3 < 2**31 else "input_only"
        for k, token in enumerate(translation):
            label: int | None = None
            if mode == "codeswitch":
                label = token
            elif mode == "input_only" and k == 0:
                label = row[position]
            stream.append((token, label))
        position = end

    tokens, labels, mask = [], [], []
    for j in range(length):
        tokens.append(stream[j][0] if j < len(stream) else pad_id)
        label = stream[j + 1][1] if j + 1 < len(stream) else None
        labels.append(0 if label is None else label)
        mask.append(0.0 if label is None or tokens[j] == eod_id else 1.0)
    return tokens, labels, mask, counts

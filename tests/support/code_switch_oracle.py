"""Code-switching in pure Python, token by token: slow, simple, and sharing no code with the implementations."""

import math
from collections.abc import Sequence
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
    forbidden: tuple[int, ...] = ()

    def arrays(self) -> dict:
        """The keyword arguments of build_ngram_table."""
        keys = list(self.keys)
        groups = [self.keys[key] for key in keys]
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
            "forbidden_tokens": self.forbidden,
        }


def choose(weights: Sequence[float | Fraction], random: int) -> int:
    """The first item whose cumulative probability times 2^32, at least 1, is above `random`."""
    total = sum(Fraction(weight) for weight in weights)
    running = Fraction(0)
    for index, weight in enumerate(weights[:-1]):
        running += Fraction(weight)
        if random < max(1, math.floor(running / total * 2**32 + Fraction(1, 2))):
            return index
    return len(weights) - 1


def choose_candidate(candidates: list[Candidate], language_weights: list[float], random: int) -> Candidate:
    """Draws a language by weight among those of the candidates, then a candidate by weight, with one random number."""
    probabilities = []
    languages = {language for language, _, _ in candidates}
    all_languages = sum(Fraction(language_weights[language]) for language in languages)
    for language, _, weight in candidates:
        within = sum(Fraction(other) for each, _, other in candidates if each == language)
        probabilities.append(Fraction(language_weights[language]) / all_languages * Fraction(weight) / within)
    return candidates[choose(probabilities, random)]


def words_of(row: list[int], flags: list[int], extra: list[bool]) -> list[tuple[int, int]]:
    """(start, end) of every word; the end of the last one is None, since the source truncates it."""
    starts = [i for i in range(len(row)) if flags[row[i]] & 1 or extra[i] or (i > 0 and flags[row[i - 1]] & 2)]
    return [(start, end) for start, end in zip(starts, [*starts[1:], None], strict=False)]


def decide(
    row: list[int],
    words: list[tuple[int, int | None]],
    language: int,
    sample_id: int,
    dictionary: Dictionary,
    thresholds: list[list[int]],
    seed: int,
) -> tuple[set[int], dict[int, tuple[int, Candidate, int]]]:
    """Starts of the known words, and start -> (end, candidate, label draw) of the replaced ones."""
    weights = dictionary.language_weights
    known: set[int] = set()
    replaced: dict[int, tuple[int, Candidate, int]] = {}
    for start, end in words:
        candidates = [
            each
            for each in dictionary.keys.get((language, tuple(row[start:end])), [])
            if each[2] > 0 and weights[each[0]] > 0
        ]
        if not candidates or end is None:
            continue
        known.add(start)
        r0, r1, _, r3 = philox((start, sample_id % 2**32, (sample_id >> 32) % 2**32, 0), (seed % 2**32, seed >> 32))
        candidate = choose_candidate(candidates, weights, r1)
        if r0 < thresholds[language][candidate[0]]:
            replaced[start] = (end, candidate, r3)
    return known, replaced


def switch_row(
    row: list[int],
    language: int,
    sample_id: int,
    dictionary: Dictionary,
    *,
    thresholds: list[list[int]],
    seed: int,
    sequence_length: int,
    label_mode: str,
    pad_id: int,
    eod_id: int | None = None,
    mask_eod: bool = False,
    reset_at_eod: bool = False,
    word_starts: list[bool] | None = None,
) -> dict[str, list]:
    """Outputs for one sequence by name."""
    flags, weights = dictionary.word_boundary, dictionary.language_weights
    words = words_of(row, flags, word_starts or [False] * len(row))
    known, replaced = decide(row, words, language, sample_id, dictionary, thresholds, seed)

    # (token, label or None, source position, document of the token)
    stream: list[tuple[int, int | None, int, int]] = []
    position = document = 0
    while position < len(row):
        if position in replaced:
            end, (_, translation, _), r3 = replaced[position]
            mode = label_mode
            if mode == "mix":
                mode = "codeswitch" if r3 < 2**31 else "input_only"
            for k, token in enumerate(translation):
                label: int | None = None
                if mode == "codeswitch":
                    label = token
                elif mode == "input_only" and k == 0:
                    label = row[position]
                stream.append((token, label, position, document))
            position = end
        else:
            stream.append((row[position], row[position], position, document))
            document += row[position] == eod_id
            position += 1

    result: dict[str, list] = {"tokens": [], "labels": [], "loss_mask": [], "position_ids": []}
    if reset_at_eod:
        result["document_starts"] = []
    for j in range(sequence_length):
        padding = j >= len(stream)
        token = pad_id if padding else stream[j][0]
        label = stream[j + 1][1] if j + 1 < len(stream) else None
        document_start = j
        while reset_at_eod and not padding and document_start > 0 and stream[document_start - 1][3] == stream[j][3]:
            document_start -= 1
        result["tokens"].append(token)
        scored = label is not None and not (mask_eod and token == eod_id)
        result["labels"].append(label if scored else 0)
        result["loss_mask"].append(float(scored))
        result["position_ids"].append(j - document_start if reset_at_eod else j)
        if reset_at_eod:
            result["document_starts"].append(document_start)

    reached = {source for _, _, source, _ in stream[:sequence_length]}
    truncated = {source for _, _, source, _ in stream} - reached
    letters = any(flag & 4 for flag in flags)
    counts = [0] * (5 + len(weights))
    counts[0] = sum(start in reached and (flags[row[start]] & 4 != 0 or not letters) for start, _ in words)
    counts[1] = len(known & reached)
    counts[2] = len(replaced.keys() & reached)
    counts[3] = max(0, sequence_length - len(stream))
    counts[4] = sum(source < sequence_length for source in truncated)
    for start in replaced.keys() & reached:
        counts[5 + replaced[start][1][0]] += 1
    result["counts"] = counts
    return result

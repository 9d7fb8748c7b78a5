"""The hash table: every key is found and no other word, draws follow the weights, invalid arrays are refused."""

import sys

import numpy as np
import pytest
import torch
from support.code_switch_oracle import Dictionary, choose
from support.messages import user_error

from megatron_prealign.kernels import build_ngram_table
from megatron_prealign.kernels.build_ngram_table import _multipliers
from megatron_prealign.kernels.ngram_table import (
    DRAW_BIAS,
    TARGET_SHIFT,
    TOKEN_BITS,
    WORD,
    NgramTable,
    draw,
    hash_columns,
    hash_slots,
    lookup,
    pack_first,
)


def columns_of(rows: np.ndarray, language: int = 0) -> list[torch.Tensor]:
    """Rows of tokens, padded with -1, as packed columns."""
    stored = torch.from_numpy(rows.astype(np.int64)) + 1
    pairs = [stored[:, 2 * i] | (stored[:, 2 * i + 1] << TOKEN_BITS) for i in range(rows.shape[1] // 2)]
    extra = sum((pair != 0).to(torch.int64) for pair in pairs) - 1
    return [pack_first(pairs[0], torch.tensor(language), extra), *pairs[1:]]


def packed(table: NgramTable, tokens: tuple[int, ...], language: int = 0) -> list[torch.Tensor]:
    row = np.full((1, 2 * table.columns), -1)
    row[0, : len(tokens)] = tokens
    return columns_of(row, language)


def is_known(table: NgramTable, tokens: tuple[int, ...], language: int = 0) -> bool:
    return len(tokens) <= 2 * table.columns and bool(lookup(table, packed(table, tokens, language))[1])


def small(keys: dict | None = None, weights: tuple[float, ...] = (0.0, 1.0)) -> dict:
    keys = {(0, (1, 2)): [(1, (3,), 1.0)]} if keys is None else keys
    return Dictionary([1, 1, 0, 1, 1, 0, 0, 0], list(weights), keys).arrays()


def random_keys(count: int, vocabulary: int, seed: int = 0) -> tuple[np.ndarray, dict]:
    """`count` distinct keys of 1 to 8 tokens as rows padded with -1, and the arrays of their table."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, vocabulary, (count + count // 2 + 50, 8)).astype(np.int32)
    rows[np.arange(8) >= generator.integers(1, 9, len(rows))[:, None]] = -1
    rows = np.unique(rows, axis=0)
    rows = generator.permutation(rows)[:count]
    lengths = (rows >= 0).sum(axis=1)
    arrays = {
        "word_boundary": np.zeros(vocabulary, dtype=np.uint8),
        "key_tokens": rows[rows >= 0],
        "key_offsets": np.append(0, np.cumsum(lengths)),
        "key_language": np.zeros(len(rows), dtype=np.int16),
        "key_candidate_offsets": np.arange(len(rows) + 1),
        "candidate_tokens": np.zeros(len(rows), dtype=np.int32),
        "candidate_offsets": np.arange(len(rows) + 1),
        "candidate_language": np.ones(len(rows), dtype=np.int16),
        "candidate_weight": np.ones(len(rows), dtype=np.float32),
        "language_weights": [0.0, 1.0],
    }
    return rows, arrays


def test_every_key_is_found_and_no_other_word() -> None:
    rows, arrays = random_keys(3000, vocabulary=60)
    table = build_ngram_table(**arrays)
    key, found = lookup(table, columns_of(rows))
    assert bool(found.all())
    assert torch.equal(key, torch.arange(len(rows)))
    known = {tuple(row) for row in rows.tolist()}
    others, _ = random_keys(3000, vocabulary=60, seed=1)
    _, found = lookup(table, columns_of(others))
    assert found.tolist() == [tuple(row) in known for row in others.tolist()]
    assert 0 < sum(found.tolist()) < len(others)


def test_load_is_at_most_half_and_memory_as_documented() -> None:
    for count in (1, 3, 100, 1024, 3000, 20_000):
        rows, arrays = random_keys(count, 60 if count < 20_000 else 5000)
        table = build_ngram_table(**arrays)
        assert 2 * count <= len(table.slots)
        assert int((table.slots & WORD < table.num_keys).sum()) == count
    candidates = table.candidates.nbytes + table.candidate_last.nbytes + table.candidate_tokens.nbytes
    # 32 bytes per key plus its tokens: four bytes each, at least two tokens, rounded up to an even number
    tokens = 4 * (len(rows) * 2 + int((rows[:, 2:] >= 0).sum()) + int((rows >= 0).sum(1).__mod__(2).sum()))
    assert table.nbytes - candidates - table.word_boundary.nbytes <= 32 * count + tokens


def test_language_is_part_of_the_key() -> None:
    table = build_ngram_table(**small({(0, (1,)): [(1, (3,), 1.0)], (1, (1, 2)): [(0, (4,), 1.0)]}, (1.0, 1.0)))
    found = {(language, tokens): is_known(table, tokens, language) for language in (0, 1) for tokens in ((1,), (1, 2))}
    assert [where for where, hit in found.items() if hit] == [(0, (1,)), (1, (1, 2))]


def test_a_prefix_of_a_key_is_not_a_key() -> None:
    table = build_ngram_table(**small({(0, (1, 2, 5, 6)): [(1, (3,), 1.0)]}))
    lengths = [length for length in (1, 2, 3, 4) if is_known(table, (1, 2, 5, 6)[:length])]
    assert lengths == [4]
    assert not is_known(table, (1, 2, 5, 7)) and not is_known(table, (1, 2, 6))


def test_equal_hashes_do_not_match() -> None:
    table = build_ngram_table(**small())
    other = packed(table, (4, 5))
    fingerprint = hash_slots(hash_columns(other, table.multipliers), len(table.slots))[2]
    # every slot has the fingerprint of the other word and points to the only key
    forged = table._replace(slots=(fingerprint << 32).expand(len(table.slots)).clone())
    key, found = lookup(forged, other)
    assert int(key) == 0 and not bool(found)
    assert bool(lookup(forged, packed(table, (1, 2)))[1])


def test_the_build_detects_colliding_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A salt for which one key hides another is rejected."""
    # the function of the same name shadows the module in the package
    module = sys.modules[build_ngram_table.__module__]
    tried: list[int] = []

    def weak_first(salt: int, columns: int) -> tuple[int, ...]:
        tried.append(salt)
        # with a factor of 2^40 the fingerprint has only a few bits of the first token
        return (1 << 40,) * columns if salt == 0 else _multipliers(salt, columns)

    monkeypatch.setattr(module, "_multipliers", weak_first)
    rows, arrays = random_keys(300, vocabulary=60)
    table = build_ngram_table(**arrays)
    assert len(tried) > 1
    assert bool(lookup(table, columns_of(rows))[1].all())


@pytest.mark.parametrize("keys", [{}, {(0, (1,)): []}, {(0, (1,)): [(1, (3,), 0.0)]}, {(0, (1,)): [(0, (3,), 1.0)]}])
def test_a_table_without_drawable_candidates_is_refused(keys: dict) -> None:
    with user_error("key_tokens", f"{len(keys)} keys", "candidate", kind=ValueError):
        build_ngram_table(**small(keys))


def test_keys_without_a_drawable_candidate_are_unknown() -> None:
    keys = {
        (0, (1,)): [(1, (3,), 0.0)],
        (0, (3,)): [(2, (4,), 1.0)],
        (0, (4,)): [(1, (3,), 1.0), (2, (4,), 1.0)],
        (0, (5,)): [],
    }
    table = build_ngram_table(**small(keys, (0.0, 1.0, 0.0)))
    assert table.num_keys == 1
    assert [is_known(table, (token,)) for token in (1, 3, 4, 5)] == [False, False, True, False]
    assert (table.candidates >> TARGET_SHIFT).tolist()[:-1] == [1]


def test_equal_weights_are_uniform() -> None:
    for weight in (1.0, 0.1, 3e-5):
        for count in (1, 2, 3, 5, 7, 60):
            keys = {(0, (1,)): [(1, (2,) * (n + 1), weight) for n in range(count)]}
            bounds = bounds_of(build_ngram_table(**small(keys)))[:count]
            widths = np.diff([0, *bounds])
            assert bounds[-1] == 2**32
            assert set(widths.tolist()) <= {2**32 // count, -(-(2**32) // count)}


def bounds_of(table: NgramTable) -> list[int]:
    """The draws at which each candidate ends."""
    return (table.candidate_last.to(torch.int64) + DRAW_BIAS + 1).tolist()


def test_draw_follows_the_weights() -> None:
    generator = np.random.default_rng(0)
    weights = [[float(w) for w in generator.integers(1, 50, count)] for count in (1, 4, 3, 9, 1, 16, 2)]
    keys = {(0, (k,)): [(1, (3,), w) for w in each] for k, each in enumerate(weights)}
    table = build_ngram_table(**small(keys))
    owner = torch.from_numpy(generator.integers(0, len(weights), 400))
    edges = [bound + step for bound in bounds_of(table) for step in (-1, 0) if bound + step < 2**32]
    random = torch.from_numpy(np.resize(np.append(edges, [0, 2**32 - 1]), 400))
    drawn = draw(table, owner, random)
    first = table.key_candidates[owner]
    expected = [choose(weights[o], r) for o, r in zip(owner.tolist(), random.tolist(), strict=True)]
    assert (drawn - first).tolist() == expected


def test_draws_follow_language_weights_and_candidate_weights() -> None:
    keys = {(0, (1,)): [(1, (3,), 9.0), (2, (4,), 1.0), (1, (5,), 3.0), (3, (6,), 1.0)]}
    table = build_ngram_table(**small(keys, (0.0, 1.0, 3.0, 0.0)))
    # language 1 has probability 1/4, of which its first candidate has 3/4; language 3 is never drawn
    assert bounds_of(table)[:3] == [3 * 2**28, 15 * 2**28, 2**32]


def test_a_tiny_weight_still_has_a_draw() -> None:
    table = build_ngram_table(**small({(0, (1,)): [(1, (3,), 1e-30), (1, (4,), 1.0)]}))
    assert bounds_of(table)[:2] == [1, 2**32]


def test_a_hundred_thousand_keys_are_all_found() -> None:
    rows, arrays = random_keys(100_000, vocabulary=50_000)
    table = build_ngram_table(**arrays)
    key, found = lookup(table, columns_of(rows))
    assert bool(found.all()) and torch.equal(key, torch.arange(len(rows)))


def broken(**changes: object) -> dict:
    return {**small(), **changes}


@pytest.mark.parametrize(
    ("arrays", "facts"),
    [
        (broken(forbidden_tokens=[2]), ("key_tokens[1]", "special token 2")),
        (broken(forbidden_tokens=[3]), ("candidate_tokens[0]", "special token 3")),
        (broken(key_tokens=np.array([1, 8])), ("key_tokens[1] is 8", "0 to 7")),
        (broken(candidate_tokens=np.array([-1])), ("candidate_tokens[0] is -1", "0 to 7")),
        (broken(key_tokens=np.ones(9, int), key_offsets=np.array([0, 9])), ("key_offsets", "length 9", "1 to 8")),
        (broken(key_offsets=np.array([0, 1])), ("key_offsets has 2 items", "(0, 1)", "from 0 to 2")),
        (broken(candidate_offsets=np.array([0])), ("candidate_offsets has 1 items", "expected 2 items")),
        (broken(key_language=np.array([2])), ("key_language[0] is 2", "0 to 1")),
        (broken(candidate_language=np.array([2])), ("candidate_language[0] is 2", "0 to 1")),
        (
            broken(key_candidate_offsets=np.array([0, 2])),
            ("key_candidate_offsets has 2 items", "(0, 2)", "from 0 to 1"),
        ),
        (broken(candidate_weight=np.array([np.nan])), ("candidate_weight[0] is nan",)),
        (broken(candidate_weight=np.array([1.0, 1.0])), ("candidate_weight has 2 items", "expected 1")),
        (broken(language_weights=[0.0, -1.0]), ("language_weights[1] is -1.0",)),
        (broken(language_weights=[]), ("language_weights has 0 items", "1 to 4096")),
        (broken(language_weights=[1.0] * 4097), ("language_weights has 4097 items", "1 to 4096")),
        (
            # arrays of this length without the memory
            broken(
                candidate_language=np.broadcast_to(np.int16(1), (1 << 25) - 1),
                candidate_weight=np.broadcast_to(np.float32(1), (1 << 25) - 1),
            ),
            ("candidate_language has 33554431 items", "fewer than 33554431"),
        ),
        (broken(candidate_tokens=np.broadcast_to(np.int32(3), 1 << 31)), ("candidate_tokens has 2147483648 items",)),
        (broken(word_boundary=np.zeros(1 << 24, np.uint8)), ("word_boundary has 16777216 items",)),
    ],
)
def test_wrong_arrays_are_refused(arrays: dict, facts: tuple) -> None:
    with user_error(*facts, kind=ValueError):
        build_ngram_table(**arrays)


def test_duplicate_keys_are_refused() -> None:
    arrays = small({(0, (1,)): [(1, (3,), 1.0)], (0, (2,)): [(1, (3,), 1.0)]})
    arrays["key_tokens"][:] = 1
    with user_error("key_tokens", "duplicate", "same language", kind=ValueError):
        build_ngram_table(**arrays)


def test_a_candidate_that_is_too_long_is_refused() -> None:
    with user_error("candidate_offsets", "item 0", 256, "1 to 255", kind=ValueError):
        build_ngram_table(**small({(0, (1,)): [(1, (3,) * 256, 1.0)]}))

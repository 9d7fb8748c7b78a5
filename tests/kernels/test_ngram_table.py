"""The hashed table: every key found, nothing else found, weights as given, wrong arrays refused."""

import sys

import numpy as np
import pytest
import torch
from support.code_switch_oracle import Dictionary, choose

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
    lookup,
    pack_first,
    places_of,
)


def columns_of(rows: np.ndarray, language: int = 0) -> list[torch.Tensor]:
    """Rows of tokens, filled up with -1, as packed columns."""
    stored = torch.from_numpy(rows.astype(np.int64)) + 1
    pairs = [stored[:, 2 * i] | (stored[:, 2 * i + 1] << TOKEN_BITS) for i in range(rows.shape[1] // 2)]
    behind = sum((pair != 0).to(torch.int64) for pair in pairs) - 1
    return [pack_first(pairs[0], torch.tensor(language), behind), *pairs[1:]]


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
    """`count` distinct keys of 1 to 8 tokens as rows filled up with -1, and the arrays of their table."""
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


def test_load_is_at_most_half_and_memory_as_promised() -> None:
    for count in (1, 3, 100, 1024, 3000, 20_000):
        rows, arrays = random_keys(count, 60 if count < 20_000 else 5000)
        table = build_ngram_table(**arrays)
        assert 2 * count <= len(table.slots)
        assert int((table.slots & WORD < table.num_keys).sum()) == count
    candidates = table.candidates.nbytes + table.candidate_last.nbytes + table.candidate_tokens.nbytes
    # 32 bytes a key plus its tokens: four bytes each, two tokens at least, an even number in all
    tokens = 4 * (len(rows) * 2 + int((rows[:, 2:] >= 0).sum()) + int((rows >= 0).sum(1).__mod__(2).sum()))
    assert table.nbytes - candidates - table.word_boundary.nbytes <= 32 * count + tokens


def test_language_is_part_of_the_key() -> None:
    table = build_ngram_table(**small({(0, (1,)): [(1, (3,), 1.0)], (1, (1, 2)): [(0, (4,), 1.0)]}, (1.0, 1.0)))
    found = {(language, tokens): is_known(table, tokens, language) for language in (0, 1) for tokens in ((1,), (1, 2))}
    assert [where for where, hit in found.items() if hit] == [(0, (1,)), (1, (1, 2))]


def test_a_prefix_of_a_key_is_no_key() -> None:
    table = build_ngram_table(**small({(0, (1, 2, 5, 6)): [(1, (3,), 1.0)]}))
    lengths = [length for length in (1, 2, 3, 4) if is_known(table, (1, 2, 5, 6)[:length])]
    assert lengths == [4]
    assert not is_known(table, (1, 2, 5, 7)) and not is_known(table, (1, 2, 6))


def test_equal_hashes_do_not_match() -> None:
    table = build_ngram_table(**small())
    stranger = packed(table, (4, 5))
    fingerprint = places_of(hash_columns(stranger, table.multipliers), len(table.slots))[2]
    # a table whose every slot claims to hold the stranger, and points to the one key
    forged = table._replace(slots=(fingerprint << 32).expand(len(table.slots)).clone())
    key, found = lookup(forged, stranger)
    assert int(key) == 0 and not bool(found)
    assert bool(lookup(forged, packed(table, (1, 2)))[1])


def test_a_fingerprint_in_the_way_is_noticed_by_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A salt under which one key hides another is not taken."""
    # the package's function of the same name hides the module
    module = sys.modules[build_ngram_table.__module__]
    tried: list[int] = []

    def weak_first(salt: int, columns: int) -> tuple[int, ...]:
        tried.append(salt)
        # a factor of 2^40 leaves the fingerprint nothing but a few bits of the first token
        return (1 << 40,) * columns if salt == 0 else _multipliers(salt, columns)

    monkeypatch.setattr(module, "_multipliers", weak_first)
    rows, arrays = random_keys(300, vocabulary=60)
    table = build_ngram_table(**arrays)
    assert len(tried) > 1
    assert bool(lookup(table, columns_of(rows))[1].all())


@pytest.mark.parametrize("keys", [{}, {(0, (1,)): []}, {(0, (1,)): [(1, (3,), 0.0)]}, {(0, (1,)): [(0, (3,), 1.0)]}])
def test_a_table_in_which_nothing_can_be_found_is_refused(keys: dict) -> None:
    with pytest.raises(ValueError, match=f"key_tokens has {len(keys)} keys, expected one or more with a candidate"):
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
            shares = np.diff([0, *bounds])
            assert bounds[-1] == 2**32
            assert set(shares.tolist()) <= {2**32 // count, -(-(2**32) // count)}


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


def test_languages_share_by_their_weights_and_candidates_within_them() -> None:
    keys = {(0, (1,)): [(1, (3,), 9.0), (2, (4,), 1.0), (1, (5,), 3.0), (3, (6,), 1.0)]}
    table = build_ngram_table(**small(keys, (0.0, 1.0, 3.0, 0.0)))
    # language 1 has a quarter, of which three quarters go to its first candidate; language 3 is never drawn
    assert bounds_of(table)[:3] == [3 * 2**28, 15 * 2**28, 2**32]


def test_a_weight_of_almost_nothing_still_has_its_draw() -> None:
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
    ("arrays", "message"),
    [
        (broken(forbidden_tokens=[2]), r"key_tokens\[1\] is the special token 2"),
        (broken(forbidden_tokens=[3]), r"candidate_tokens\[0\] is the special token 3"),
        (broken(key_tokens=np.array([1, 8])), r"key_tokens\[1\] is 8, expected 0 to 7"),
        (broken(candidate_tokens=np.array([-1])), r"candidate_tokens\[0\] is -1"),
        (broken(key_tokens=np.ones(9, int), key_offsets=np.array([0, 9])), "item 0 has length 9, expected 1 to 8"),
        (broken(key_offsets=np.array([0, 1])), "ends"),
        (broken(candidate_offsets=np.array([0])), "candidate_offsets has 1 items"),
        (broken(key_language=np.array([2])), r"key_language\[0\] is 2"),
        (broken(candidate_language=np.array([2])), r"candidate_language\[0\] is 2, expected 0 to 1"),
        (broken(key_candidate_offsets=np.array([0, 2])), r"key_candidate_offsets has 2 items with ends \(0, 2\)"),
        (broken(candidate_weight=np.array([np.nan])), r"candidate_weight\[0\] is nan"),
        (broken(candidate_weight=np.array([1.0, 1.0])), "candidate_weight has 2 items"),
        (broken(language_weights=[0.0, -1.0]), r"language_weights\[1\] is -1.0"),
        (broken(language_weights=[]), "language_weights has 0 items"),
        (broken(language_weights=[1.0] * 4097), "language_weights has 4097 items, expected 1 to 4096"),
        (
            # as long as it says without the memory
            broken(
                candidate_language=np.broadcast_to(np.int16(1), (1 << 25) - 1),
                candidate_weight=np.broadcast_to(np.float32(1), (1 << 25) - 1),
            ),
            "candidate_language has 33554431 items, expected fewer than 33554431",
        ),
        (broken(candidate_tokens=np.broadcast_to(np.int32(3), 1 << 31)), "candidate_tokens has 2147483648 items"),
        (broken(word_boundary=np.zeros(1 << 24, np.uint8)), "the vocabulary has 16777216 tokens"),
    ],
)
def test_wrong_arrays_are_refused(arrays: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_ngram_table(**arrays)


def test_twin_keys_are_refused() -> None:
    arrays = small({(0, (1,)): [(1, (3,), 1.0)], (0, (2,)): [(1, (3,), 1.0)]})
    arrays["key_tokens"][:] = 1
    with pytest.raises(ValueError, match="same language and the same tokens"):
        build_ngram_table(**arrays)


def test_a_candidate_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="candidate_offsets: item 0 has length 256, expected 1 to 255"):
        build_ngram_table(**small({(0, (1,)): [(1, (3,) * 256, 1.0)]}))

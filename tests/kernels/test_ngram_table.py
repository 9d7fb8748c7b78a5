"""The hashed table: every key found, nothing else found, weights as given, wrong arrays refused."""

import numpy as np
import pytest
import torch
from code_switch_oracle import Dictionary, choose

from megatron_prealign.kernels.ngram_table import (
    LANGUAGE_SHIFT,
    TOKEN_BITS,
    NgramTable,
    build_ngram_table,
    draw,
    hash_columns,
    lookup,
)


def find(table: NgramTable, columns: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return lookup(table, columns, torch.ones_like(columns[0], dtype=torch.bool))


def packed(language: int, tokens: tuple[int, ...], columns: int) -> list[torch.Tensor]:
    values = [0] * columns
    for index, token in enumerate(tokens):
        values[index // 2] |= (token + 1) << (TOKEN_BITS * (index % 2))
    values[0] |= language << LANGUAGE_SHIFT
    return [torch.tensor([value]) for value in values]


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


def columns_of(rows: np.ndarray) -> list[torch.Tensor]:
    stored = torch.from_numpy(rows.astype(np.int64)) + 1
    return [stored[:, 2 * i] | (stored[:, 2 * i + 1] << TOKEN_BITS) for i in range(4)]


def test_every_key_is_found_and_no_other_word() -> None:
    rows, arrays = random_keys(3000, vocabulary=60)
    table = build_ngram_table(**arrays)
    key, found = find(table, columns_of(rows))
    assert bool(found.all())
    assert torch.equal(key.long(), torch.arange(len(rows)))
    known = {tuple(row) for row in rows.tolist()}
    others, _ = random_keys(3000, vocabulary=60, seed=1)
    _, found = find(table, columns_of(others))
    assert found.tolist() == [tuple(row) in known for row in others.tolist()]
    assert 0 < sum(found.tolist()) < len(others)


def test_only_wanted_words_are_found() -> None:
    rows, arrays = random_keys(100, vocabulary=60)
    wanted = torch.arange(100) % 3 == 0
    key, found = lookup(build_ngram_table(**arrays), columns_of(rows), wanted)
    assert torch.equal(found, wanted)
    assert torch.equal(key.long()[wanted], torch.arange(100)[wanted])


def test_load_is_at_most_half() -> None:
    for count in (1, 3, 100, 1024, 3000):
        table = build_ngram_table(**random_keys(count, 60)[1])
        assert len(table.slot_key) == 1 << table.slot_bits
        assert 2 * count <= len(table.slot_key)
        assert int((table.slot_key < table.num_keys).sum()) == count


def test_language_is_part_of_the_key() -> None:
    table = build_ngram_table(**small({(0, (1,)): [(1, (3,), 1.0)], (1, (1, 2)): [(0, (4,), 1.0)]}, (1.0, 1.0)))
    columns = len(table.multipliers)
    found = {
        (language, tokens): bool(find(table, packed(language, tokens, columns))[1])
        for language in (-1, 0, 1)
        for tokens in ((1,), (1, 2))
    }
    assert [where for where, hit in found.items() if hit] == [(0, (1,)), (1, (1, 2))]


def test_equal_hashes_do_not_match() -> None:
    table = build_ngram_table(**small())
    stranger = packed(0, (4, 5), len(table.multipliers))
    hashed = hash_columns(stranger, table.multipliers)
    # a table whose every slot claims to hold the stranger's hash, and points to the one key
    forged = table._replace(
        slot_hash=hashed.expand(len(table.slot_hash)).clone(), slot_key=torch.zeros_like(table.slot_key)
    )
    assert not bool(find(forged, stranger)[1])
    assert bool(find(forged, packed(0, (1, 2), len(table.multipliers)))[1])


def test_no_keys() -> None:
    table = build_ngram_table(**small({}))
    assert table.num_keys == 0
    assert not bool(find(table, packed(0, (1,), len(table.multipliers)))[1])


def test_keys_without_a_drawable_candidate_are_unknown() -> None:
    keys = {
        (0, (1,)): [(1, (3,), 0.0)],
        (0, (3,)): [(2, (4,), 1.0)],
        (0, (4,)): [(1, (3,), 1.0), (2, (4,), 1.0)],
        (0, (5,)): [],
    }
    table = build_ngram_table(**small(keys, (0.0, 1.0, 0.0)))
    assert table.num_keys == 1
    assert [bool(find(table, packed(0, (token,), 1))[1]) for token in (1, 3, 4, 5)] == [False, False, True, False]
    assert table.entry_language.tolist()[:1] == [1]


def test_equal_weights_are_uniform() -> None:
    for weight in (1.0, 0.1, 3e-5):
        for count in (1, 2, 3, 5, 7, 60):
            keys = {(0, (1,)): [(1, (2,) * (n + 1), weight) for n in range(count)]}
            bounds = build_ngram_table(**small(keys)).candidate_bound[:count].tolist()
            shares = np.diff([0, *bounds])
            assert bounds[-1] == 2**32
            assert set(shares.tolist()) <= {2**32 // count, -(-(2**32) // count)}


def test_draw_follows_the_weights() -> None:
    generator = np.random.default_rng(0)
    weights = [[float(w) for w in generator.integers(1, 50, count)] for count in (1, 4, 3, 9, 1, 16, 2)]
    keys = {(0, (k,)): [(1, (3,), w) for w in each] for k, each in enumerate(weights)}
    table = build_ngram_table(**small(keys))
    owner = torch.from_numpy(generator.integers(0, len(weights), 400))
    edges = [bound + step for bound in table.candidate_bound.tolist() for step in (-1, 0) if bound + step < 2**32]
    random = torch.from_numpy(np.resize(np.append(edges, [0, 2**32 - 1]), 400))
    drawn = draw(table.entry_candidates, table.candidate_bound, owner, random, table.candidate_steps)
    first = table.entry_candidates[owner]
    expected = [choose(weights[o], r) for o, r in zip(owner.tolist(), random.tolist(), strict=True)]
    assert (drawn - first).tolist() == expected


def test_a_hundred_thousand_keys_are_all_found() -> None:
    rows, arrays = random_keys(100_000, vocabulary=50_000)
    table = build_ngram_table(**arrays)
    key, found = find(table, columns_of(rows))
    assert bool(found.all()) and torch.equal(key.long(), torch.arange(len(rows)))


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
        (broken(candidate_weight=np.array([np.nan])), r"candidate_weight\[0\] is nan"),
        (broken(candidate_weight=np.array([1.0, 1.0])), "candidate_weight has 2 items"),
        (broken(language_weights=[0.0, -1.0]), r"language_weights\[1\] is -1.0"),
        (broken(language_weights=[]), "language_weights has 0 items"),
        (broken(word_boundary=np.zeros(1 << 24, np.uint8)), "the vocabulary has 16777216 tokens"),
    ],
)
def test_wrong_arrays_are_refused(arrays: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_ngram_table(**arrays)


def test_unsorted_candidates_and_twin_keys_are_refused() -> None:
    arrays = small({(0, (1,)): [(0, (3,), 1.0), (1, (4,), 1.0)]}, (1.0, 1.0))
    arrays["candidate_language"] = arrays["candidate_language"][::-1].copy()
    with pytest.raises(ValueError, match="sorted by language"):
        build_ngram_table(**arrays)
    arrays = small({(0, (1,)): [(1, (3,), 1.0)], (0, (2,)): [(1, (3,), 1.0)]})
    arrays["key_tokens"][:] = 1
    with pytest.raises(ValueError, match="same language and the same tokens"):
        build_ngram_table(**arrays)

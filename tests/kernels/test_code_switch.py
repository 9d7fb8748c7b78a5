"""The torch reference against the pure-Python oracle, the worked example, and what must hold for any table."""

import numpy as np
import pytest
import torch
from code_switch_oracle import Dictionary, philox, switch_row

from megatron_prealign.kernels import (
    LABEL_MODES,
    CodeSwitchOutput,
    build_ngram_table,
    code_switch_reference,
    ratio_threshold,
)

EOD = 0


def switch(rows: list[list[int]], dictionary: Dictionary, **options) -> CodeSwitchOutput:
    languages = options.pop("language", [0] * len(rows))
    samples = options.pop("sample_id", list(range(len(rows))))
    thresholds = options.pop("thresholds", [1 << 32] * len(dictionary.language_weights))
    options = {"seed": 7, "label_mode": "input_only", "pad_id": EOD, **options}
    return code_switch_reference(
        torch.tensor(rows, dtype=options.pop("dtype", torch.int64)),
        torch.tensor(languages),
        torch.tensor(samples),
        build_ngram_table(**dictionary.arrays()),
        thresholds=torch.tensor(thresholds),
        **options,
    )


def assert_equals_oracle(rows: list[list[int]], dictionary: Dictionary, **options) -> CodeSwitchOutput:
    """Every output, exactly; returns the reference's."""
    given = {
        "language": [0] * len(rows),
        "sample_id": list(range(len(rows))),
        "thresholds": [1 << 32] * len(dictionary.language_weights),
        "seed": 7,
        "label_mode": "input_only",
        "pad_id": EOD,
        "eod_id": None,
        **options,
    }
    output = switch(rows, dictionary, **given)
    given.pop("dtype", None)
    pairs = list(zip(rows, given.pop("language"), given.pop("sample_id"), strict=True))
    expected = [switch_row(row, language, sample, dictionary, **given) for row, language, sample in pairs]
    assert torch.equal(output.tokens, torch.tensor([each[0] for each in expected]))
    assert torch.equal(output.labels, torch.tensor([each[1] for each in expected]))
    assert torch.equal(output.loss_mask, torch.tensor([each[2] for each in expected]))
    assert torch.equal(output.counts, torch.tensor([each[3] for each in expected]).sum(dim=0))
    assert torch.equal(output.position_ids, torch.arange(len(rows[0]) - 1).expand(len(rows), -1))
    return output


# The worked example of the method: The | c at | sat | . with cat -> K A T
THE, C, AT, SAT, DOT, K, A, T, NEXT, LAST = range(1, 11)
EXAMPLE_FLAGS = [3, 5, 5, 4, 5, 3, 5, 4, 4, 5, 5]
EXAMPLE_ROW = [THE, C, AT, SAT, DOT, NEXT, LAST]


def example() -> Dictionary:
    return Dictionary(EXAMPLE_FLAGS, [0.0, 1.0], {(0, (C, AT)): [(1, (K, A, T), 1.0)]})


@pytest.mark.parametrize(
    ("label_mode", "labels", "mask"),
    [
        ("input_only", [C, 0, 0, SAT, DOT, NEXT], [1, 0, 0, 1, 1, 1]),
        ("codeswitch", [K, A, T, SAT, DOT, NEXT], [1, 1, 1, 1, 1, 1]),
        ("no_predict", [0, 0, 0, SAT, DOT, NEXT], [0, 0, 0, 1, 1, 1]),
    ],
)
def test_worked_example(label_mode: str, labels: list[int], mask: list[int]) -> None:
    output = assert_equals_oracle([EXAMPLE_ROW], example(), label_mode=label_mode)
    assert output.tokens.tolist() == [[THE, K, A, T, SAT, DOT]]
    assert output.labels.tolist() == [labels]
    assert output.loss_mask.tolist() == [mask]
    assert output.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    # The, cat, sat, NEXT run; the full stop has no letter, LAST is cut by the edge
    assert output.counts.tolist() == [4, 1, 1, 0, 1]


def test_mix_takes_both_label_rules() -> None:
    rows = [EXAMPLE_ROW] * 200
    output = assert_equals_oracle(rows, example(), label_mode="mix")
    kinds = {tuple(row) for row in output.labels.tolist()}
    assert kinds == {(C, 0, 0, SAT, DOT, NEXT), (K, A, T, SAT, DOT, NEXT)}
    share = float((output.labels[:, 0] == K).float().mean())
    # 200 fair coins: 5 standard deviations are 0.18
    assert abs(share - 0.5) < 0.18


def random_word(generator: np.random.Generator, flags: list[int], most: int) -> tuple[int, ...]:
    """A word that the boundary rule keeps whole: starts with a boundary, none inside."""
    begin = [t for t, flag in enumerate(flags) if flag & 1 and not flag & 2 and t != EOD]
    inner = [t for t, flag in enumerate(flags) if not flag & 3]
    length = int(generator.integers(1, most + 1))
    return (int(generator.choice(begin)), *(int(t) for t in generator.choice(inner, length - 1)))


def random_case(seed: int) -> tuple[list[list[int]], Dictionary, dict]:
    generator = np.random.default_rng(seed)
    vocabulary, languages = 40, int(generator.integers(2, 5))
    flags = generator.choice([0, 0, 1, 1, 2, 3], vocabulary)
    flags[:6] = [3, 1, 0, 1, 0, 2]
    if seed % 3:
        flags |= generator.choice([0, 4], vocabulary, p=[0.3, 0.7])
        flags[EOD] = 3
    dictionary = Dictionary(flags.tolist(), [float(w) for w in generator.choice([0, 1, 2, 3], languages)])
    for _ in range(int(generator.integers(1, 60))):
        word = random_word(generator, dictionary.word_boundary, most=int(generator.choice([1, 3, 8])))
        dictionary.keys[int(generator.integers(0, 2)), word] = [
            (
                int(generator.integers(0, languages)),
                tuple(
                    generator.integers(
                        1, vocabulary, generator.choice([1, 2, 3, 50], p=[0.4, 0.3, 0.25, 0.05])
                    ).tolist()
                ),
                float(generator.integers(0, 4)),
            )
            for _ in range(int(generator.integers(1, 6)))
        ]
    width = int(generator.choice([2, 3, 9, 33, 65]))
    row_languages = generator.choice([-1, 0, 1], 6, p=[0.1, 0.45, 0.45]).tolist()
    rows = []
    for language in row_languages:
        words = [word for key_language, word in dictionary.keys if key_language == language] or [(EOD,)]
        row: list[int] = []
        while len(row) < width + 8:
            known = generator.random() < 0.7
            row += words[generator.integers(len(words))] if known else generator.integers(0, vocabulary, 2).tolist()
        cut = int(generator.integers(0, 8))
        rows.append(row[cut : cut + width])
    options = {
        "language": row_languages,
        "sample_id": generator.integers(-(1 << 63), 1 << 63, 6).tolist(),
        "thresholds": [
            ratio_threshold(ratio) for ratio in generator.choice([0.0, 0.3, 1.0], languages, p=[0.1, 0.3, 0.6])
        ],
        "seed": int(generator.integers(0, 1 << 64, dtype=np.uint64)),
        "label_mode": LABEL_MODES[seed % 4],
        "pad_id": int(generator.integers(0, vocabulary)),
        "eod_id": EOD if seed % 2 else None,
        "dtype": torch.int32 if seed % 5 else torch.int64,
    }
    return rows, dictionary, options


@pytest.mark.parametrize("block", range(8))
def test_random_cases_equal_the_oracle(block: int) -> None:
    switched = 0
    for seed in range(50 * block, 50 * block + 50):
        output = assert_equals_oracle(*random_case(seed)[:2], **random_case(seed)[2])
        switched += int(output.counts[2])
    assert switched > 300


# tokens that start a word (1..9) and go on (11..19); one key of every length from 1 to 9 tokens
EDGE_FLAGS = [3] + [1] * 10 + [0] * 10
CONTINUED = list(range(11, 19))


def edge(translation: tuple[int, ...] = (9,), length: int = 1, weights: tuple[float, ...] = (0.0, 1.0)) -> Dictionary:
    return Dictionary(EDGE_FLAGS, list(weights), {(0, (1, *CONTINUED[: length - 1])): [(1, translation, 1.0)]})


@pytest.mark.parametrize("length", range(1, 9))
def test_ngrams_up_to_eight_tokens(length: int) -> None:
    word = [1, *CONTINUED[: length - 1]]
    # whole; one token longer; one token shorter
    row = [2, *word, 2, *word, 19, 2, *(word[:-1] or [3]), 2]
    output = assert_equals_oracle([row], edge(length=length))
    assert output.counts.tolist()[1:3] == [1, 1]
    assert output.tokens[0, :2].tolist() == [2, 9]


def test_words_longer_than_eight_tokens_are_left_alone() -> None:
    row = [1, *CONTINUED[:7], 19, 19, 2, 1, *CONTINUED[:7], 2]
    output = assert_equals_oracle([row], edge(length=8))
    assert output.counts.tolist() == [3, 1, 1, 0, 1]
    assert output.tokens[0, :12].tolist() == [*row[:11], 9]


def test_words_cut_by_the_window_are_left_alone() -> None:
    inside = [1, *CONTINUED[:2]]
    whole = assert_equals_oracle([[*inside, 2, 2]], edge(length=3))
    assert whole.counts[2] == 1
    cut_left = assert_equals_oracle(
        [[*inside[1:], 2, 2, 2]], Dictionary(EDGE_FLAGS, [0.0, 1.0], {(0, tuple(inside[1:])): [(1, (9,), 1.0)]})
    )
    cut_right = assert_equals_oracle([[2, 2, *inside]], edge(length=3))
    assert cut_left.counts[1] == cut_right.counts[1] == 0
    assert cut_right.tokens.tolist() == [[2, 2, 1, 11]]


def test_adjacent_words_each_keep_their_own_label() -> None:
    row = [2, 1, 11, 1, 11, 1, 11, 3, 4, 5]
    output = assert_equals_oracle([row], edge((8, 18, 18), length=2))
    assert output.tokens.tolist() == [[2, 8, 18, 18, 8, 18, 18, 8, 18]]
    assert output.labels.tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 0]]


@pytest.mark.parametrize("label_mode", LABEL_MODES)
def test_growth_is_cut_and_shrinking_is_padded(label_mode: str) -> None:
    row = [1, 11, 12, 1, 11, 12, 1, 11, 12, 2]
    grown = assert_equals_oracle([row], edge((8,) * 5, length=3), label_mode=label_mode)
    assert grown.tokens.tolist() == [[8] * 9]
    shrunk = assert_equals_oracle([row], edge((8,), length=3), label_mode=label_mode, pad_id=10)
    assert shrunk.tokens.tolist() == [[8, 8, 8, 2, 10, 10, 10, 10, 10]]
    assert shrunk.loss_mask[0, 3:].tolist() == [0] * 6
    longer_than_row = assert_equals_oracle([row], edge((8,) * 500, length=3), label_mode=label_mode)
    assert longer_than_row.tokens.tolist() == [[8] * 9]
    whole_row = assert_equals_oracle([[2, 1, 2]], edge((8,) * 500), label_mode=label_mode)
    assert whole_row.tokens.tolist() == [[2, 8]]


def test_end_of_document_positions_are_masked_on_request() -> None:
    row = [1, 2, EOD, 1, 2, EOD, 2]
    plain = assert_equals_oracle([row], edge())
    masked = assert_equals_oracle([row], edge(), eod_id=EOD)
    assert plain.loss_mask.tolist() == [[1] * 6]
    assert masked.loss_mask.tolist() == [[1, 1, 0, 1, 1, 0]]
    assert masked.tokens.tolist() == [[9, 2, EOD, 9, 2, EOD]]


def test_a_token_that_ends_in_a_non_letter_opens_a_word() -> None:
    flags = [3, 3, 0, 2, 0, 1]
    dictionary = Dictionary(flags, [0.0, 1.0], {(0, (2,)): [(1, (4,), 1.0)]})
    # 2 opens a word after 3 (ends in a non-letter), not after 4
    output = assert_equals_oracle([[5, 3, 2, 5, 4, 2, 5]], dictionary)
    assert output.tokens.tolist() == [[5, 3, 4, 5, 4, 2]]


def test_rows_of_unknown_or_other_languages_pass_unchanged() -> None:
    rows = [[1, 1, 1, 2]] * 3
    output = assert_equals_oracle(rows, edge(), language=[0, 1, -1])
    assert output.tokens.tolist() == [[9, 9, 9], [1, 1, 1], [1, 1, 1]]


def test_ratio_zero_and_no_keys_are_the_identity() -> None:
    rows, dictionary, options = random_case(1)
    tokens = torch.tensor(rows)
    options = {**options, "eod_id": None, "thresholds": [0] * len(dictionary.language_weights)}
    empty = Dictionary(dictionary.word_boundary, dictionary.language_weights)
    for table, thresholds in ((dictionary, options["thresholds"]), (empty, [1 << 32] * len(options["thresholds"]))):
        for mode in LABEL_MODES:
            changes = {"label_mode": mode, "thresholds": thresholds}
            output = assert_equals_oracle(rows, table, **{**options, **changes})
            assert torch.equal(output.tokens, tokens[:, :-1]) and torch.equal(output.labels, tokens[:, 1:])
            assert bool((output.loss_mask == 1).all())


def test_threshold_ends() -> None:
    assert (ratio_threshold(0.0), ratio_threshold(0.5), ratio_threshold(1.0)) == (0, 1 << 31, 1 << 32)


def test_threshold_is_exclusive() -> None:
    drawn = philox((0, 0, 0, 0), (7, 0))[0]
    kept = switch([[1, 2]], edge(), thresholds=[0, drawn], seed=7)
    switched = switch([[1, 2]], edge(), thresholds=[0, drawn + 1], seed=7)
    assert (kept.tokens.tolist(), switched.tokens.tolist()) == ([[1]], [[9]])


def test_no_step_reads_data_back() -> None:
    rows, dictionary, options = random_case(8)
    built = build_ngram_table(**dictionary.arrays())
    # tensors of the meta device have shapes but no data: .item(), nonzero and boolean indexing raise there
    table = built._replace(
        **{name: each.to("meta") for name, each in built._asdict().items() if isinstance(each, torch.Tensor)}
    )
    for mode in LABEL_MODES:
        output = code_switch_reference(
            torch.tensor(rows, device="meta"),
            torch.zeros(6, dtype=torch.int64, device="meta"),
            torch.zeros(6, dtype=torch.int64, device="meta"),
            table,
            seed=1,
            thresholds=torch.tensor(options["thresholds"], device="meta"),
            label_mode=mode,
            pad_id=EOD,
            eod_id=EOD,
        )
        assert all(each.shape == (6, len(rows[0]) - 1) for each in output[:4])


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_rate_is_the_ratio(ratio: float) -> None:
    rows = [[1] * 513] * 16
    output = switch(rows, edge(), thresholds=[0, ratio_threshold(ratio)])
    running, known, switched, *_ = output.counts.tolist()
    assert running == known == 16 * 512
    # 5 standard deviations of a binomial: fails by chance once in two million seeds
    assert abs(switched - ratio * known) < 5 * (known * ratio * (1 - ratio)) ** 0.5


def test_target_languages_follow_weights_and_own_ratios() -> None:
    dictionary = Dictionary(EDGE_FLAGS, [0.0, 1.0, 3.0, 0.0], {(0, (1,)): [(n, (5 + n,), 1.0) for n in (1, 2, 3)]})
    rows = [[1] * 513] * 16
    counts = assert_equals_oracle(rows, dictionary).counts.tolist()
    known = counts[1]
    assert counts[3] == counts[6] == 0 and counts[4] + counts[5] == counts[2] == known
    # 5 standard deviations of a binomial with p = 1/4
    assert abs(counts[4] - known / 4) < 5 * (known * 3 / 16) ** 0.5
    own = assert_equals_oracle(rows, dictionary, thresholds=[0, 1 << 32, 0, 0]).counts.tolist()
    assert own[2] == own[4] == counts[4]


def test_a_row_does_not_depend_on_its_batch() -> None:
    rows, dictionary, options = next(case for case in map(random_case, range(100)) if len(case[0][0]) == 65)
    dictionary.language_weights = [1.0] * len(dictionary.language_weights)
    options["thresholds"] = [1 << 31] * len(dictionary.language_weights)
    whole = switch(rows, dictionary, **options)
    assert whole.counts[2] > 10
    order = [4, 1, 5, 0]
    part = {
        **options,
        "language": [options["language"][i] for i in order],
        "sample_id": [options["sample_id"][i] for i in order],
    }
    again = switch([rows[i] for i in order], dictionary, **part)
    for one, other in zip(whole[:4], again[:4], strict=True):
        assert torch.equal(one[order], other)


def test_seed_and_sample_id_decide() -> None:
    rows = [[1] * 65] * 2
    half = {"thresholds": [0, 1 << 31]}
    first = switch(rows, edge(), sample_id=[3, 4], **half)
    assert torch.equal(first.tokens, switch(rows, edge(), sample_id=[3, 4], **half).tokens)
    assert not torch.equal(first.tokens[0], first.tokens[1])
    for changed in ({"seed": 8}, {"seed": 7 + (1 << 32)}, {"sample_id": [3 + (1 << 32), 4 + (1 << 32)]}):
        other = switch(rows, edge(), **{"sample_id": [3, 4], **half, **changed})
        assert not torch.equal(first.tokens[0], other.tokens[0])


def test_inputs_are_left_as_they_were() -> None:
    rows, dictionary, options = random_case(5)
    tokens = torch.tensor(rows)
    table = build_ngram_table(**dictionary.arrays())
    before = [each.clone() for each in table if isinstance(each, torch.Tensor)]
    code_switch_reference(
        tokens,
        torch.zeros(6, dtype=torch.int64),
        torch.arange(6),
        table,
        seed=1,
        thresholds=torch.tensor(options["thresholds"]),
        label_mode="mix",
        pad_id=EOD,
    )
    assert torch.equal(tokens, torch.tensor(rows))
    after = [each for each in table if isinstance(each, torch.Tensor)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(2, 1, dtype=torch.int64)}, r"tokens is torch.int64 \[2, 1\]"),
        ({"tokens": torch.zeros(2, 4)}, "tokens is torch.float32"),
        ({"language": torch.zeros(3, dtype=torch.int64)}, r"language is torch.int64 \[3\]"),
        ({"language": torch.zeros(2)}, "language is torch.float32"),
        ({"sample_id": torch.zeros(2, dtype=torch.int32)}, "sample_id is torch.int32"),
        ({"thresholds": torch.zeros(3, dtype=torch.int64)}, r"thresholds is torch.int64 \[3\]"),
        ({"seed": 1 << 64}, "seed is"),
        ({"label_mode": "input-only"}, "label_mode is 'input-only'"),
    ],
)
def test_wrong_inputs_are_refused(changes: dict, message: str) -> None:
    arguments = {
        "tokens": torch.zeros(2, 4, dtype=torch.int64),
        "language": torch.zeros(2, dtype=torch.int64),
        "sample_id": torch.zeros(2, dtype=torch.int64),
        "table": build_ngram_table(**edge().arrays()),
        "seed": 0,
        "thresholds": torch.zeros(2, dtype=torch.int64),
        "label_mode": "mix",
        "pad_id": 0,
    }
    with pytest.raises(ValueError, match=message):
        code_switch_reference(**{**arguments, **changes})

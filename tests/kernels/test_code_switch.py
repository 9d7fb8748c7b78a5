"""Code-switching against the pure-Python oracle, the worked example, and properties of any table.

The same tests run for every implementation that this process can run: the plain-torch reference, and on a GPU or under
TRITON_INTERPRET=1 (a separate process in `make test`) both forms of the Triton kernel.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.code_switch_cases import (
    BLOCK,
    CONTINUED,
    DEVICE,
    EDGE_FLAGS,
    EOD,
    IMPLEMENTATIONS,
    Case,
    Run,
    assert_equals_oracle,
    assert_properties,
    cases,
    edge,
    mixed_case,
)
from support.code_switch_oracle import Dictionary, philox
from support.marks import fewer_interpreted, slow_except, slow_interpreted
from support.messages import user_error

from megatron_prealign.kernels import (
    LABEL_MODES,
    CodeSwitchBatch,
    CodeSwitchOutput,
    code_switch_reference,
    ratio_threshold,
)
from megatron_prealign.kernels._triton import INTERPRETED
from megatron_prealign.kernels.code_switch import LaunchShape, launch_code_switch
from megatron_prealign.kernels.ngram_table import DRAW_BIAS, TOKEN_BITS, hash_columns, hash_slots, pack_first

# For a longer run: CODE_SWITCH_EXAMPLES=5000 make test-all
EXAMPLES = int(os.environ.get("CODE_SWITCH_EXAMPLES", "40" if INTERPRETED else "300"))

# Rows of words, for statistics over many draws.
MANY = [[1] * 193] if INTERPRETED else [[1] * 257] * 8
DRAWS = len(MANY) * (len(MANY[0]) - 1)


# The worked example of the method: The | c at | sat | . with cat -> K A T
THE, C, AT, SAT, DOT, K, A, T, NEXT, LAST = range(1, 11)
EXAMPLE = Case(
    rows=[[THE, C, AT, SAT, DOT, NEXT, LAST]],
    dictionary=Dictionary([3, 5, 5, 4, 5, 3, 5, 4, 4, 5, 5], [0.0, 1.0], {(0, (C, AT)): [(1, (K, A, T), 1.0)]}, (EOD,)),
    settings={},
)


@pytest.mark.parametrize(
    ("label_mode", "labels", "mask"),
    [
        ("input_only", [C, 0, 0, SAT, DOT, NEXT], [1, 0, 0, 1, 1, 1]),
        ("codeswitch", [K, A, T, SAT, DOT, NEXT], [1, 1, 1, 1, 1, 1]),
        ("no_predict", [0, 0, 0, SAT, DOT, NEXT], [0, 0, 0, 1, 1, 1]),
    ],
)
def test_worked_example(checked: Run, label_mode: str, labels: list[int], mask: list[int]) -> None:
    output = checked(EXAMPLE.but(label_mode=label_mode))
    assert output.tokens.tolist() == [[THE, K, A, T, SAT, DOT]]
    assert output.labels.tolist() == [labels]
    assert output.loss_mask.tolist() == [mask]
    assert output.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    # The, cat and sat are running words; the full stop has no letter; NEXT no longer fits and LAST is lookahead
    assert output.counts.tolist() == [[3, 1, 1, 0, 1, 0, 1]]


@slow_interpreted
def test_mix_takes_both_label_rules(checked: Run) -> None:
    output = checked(EXAMPLE.but(rows=EXAMPLE.rows * 100, label_mode="mix"))
    kinds = {tuple(row) for row in output.labels.tolist()}
    assert kinds == {(C, 0, 0, SAT, DOT, NEXT), (K, A, T, SAT, DOT, NEXT)}
    fraction = float((output.labels[:, 0] == K).float().mean())
    # 100 fair coins: 5 standard deviations are 0.25
    assert abs(fraction - 0.5) < 0.25


def test_mix_takes_half_of_the_draws(checked: Run) -> None:
    sample_id = 5833383687
    # the first sample id that draws exactly half
    assert philox((0, sample_id % 2**32, sample_id >> 32, 0), (7, 0))[3] == 1 << 31
    output = checked(edge([[1, 2, 2]], (8, 18), label_mode="mix", sample_id=[sample_id]))
    assert output.labels.tolist() == [[0, 2]]


@pytest.mark.parametrize("examples", slow_except([EXAMPLES // 3, EXAMPLES], EXAMPLES // 3))
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_any_case_equals_the_oracle_and_has_the_properties(name: str, examples: int) -> None:
    switched = 0

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(cases(max_rows=3, max_sequence=24) if INTERPRETED else cases())
    def compare(case: Case) -> None:
        nonlocal switched
        output = assert_equals_oracle(case.but(device=DEVICE), IMPLEMENTATIONS[name])
        switched += assert_properties(case, output)

    compare()
    # the cases are not trivial
    assert switched > examples


@pytest.mark.parametrize("length", range(1, 9))
def test_ngrams_up_to_eight_tokens(checked: Run, length: int) -> None:
    word = [1, *CONTINUED[: length - 1]]
    # the word; one token longer; one token shorter
    row = [2, *word, 2, *word, 19, 2, *(word[:-1] or [3]), 2]
    output = checked(edge([row], length=length))
    assert output.counts[0, 1:3].tolist() == [1, 1]
    assert output.tokens[0, :2].tolist() == [2, 9]


def test_words_longer_than_eight_tokens_are_not_switched(checked: Run) -> None:
    row = [1, *CONTINUED[:7], 19, 19, 2, 1, *CONTINUED[:7], 2]
    output = checked(edge([row], length=8))
    assert output.counts[0, 1:3].tolist() == [1, 1]
    assert output.tokens[0, :12].tolist() == [*row[:11], 9]


@pytest.mark.parametrize("place", [None, *range(8)])
def test_a_word_with_the_same_hash_is_not_known(
    implementation: Callable[..., CodeSwitchOutput], place: int | None
) -> None:
    word = [1, *CONTINUED[:7]]
    if place is not None:
        word[place] = 2 if place == 0 else 19
    arguments = edge([[2, *word, 2]], length=8, device=DEVICE).arguments()
    table = arguments["table"]
    stored = torch.tensor(word, device=DEVICE) + 1
    pairs = stored[::2] + (stored[1::2] << TOKEN_BITS)
    columns = [pack_first(pairs[:1], torch.zeros_like(pairs[:1]), 3), *pairs[1:].split(1)]
    fingerprint = hash_slots(hash_columns(columns, table.multipliers), len(table.slots))[2]
    # every slot has the fingerprint of the word and points to the only key
    forged = table._replace(slots=(fingerprint << 32).repeat(len(table.slots)))
    output = implementation(**{**arguments, "table": forged})
    assert int(output.counts[0, 1]) == (place is None)


def test_words_cut_by_the_edge_are_not_switched(checked: Run) -> None:
    inside = [1, *CONTINUED[:2]]
    complete = checked(edge([[*inside, 2, 2]], length=3))
    assert complete.counts[0, 2] == 1
    rest = Dictionary(EDGE_FLAGS, [0.0, 1.0], {(0, tuple(inside[1:])): [(1, (9,), 1.0)]}, (EOD,))
    cut_left = checked(edge([[*inside[1:], 2, 2, 2]], dictionary=rest))
    cut_right = checked(edge([[2, 2, *inside]], length=3))
    assert cut_left.counts[0, 1] == cut_right.counts[0, 1] == 0
    assert cut_right.tokens.tolist() == [[2, 2, 1, 11]]


def test_a_word_that_crosses_a_block_boundary_is_replaced(checked: Run) -> None:
    word = [1, *CONTINUED[:4]]
    for start in range(BLOCK - 6, BLOCK + 2):
        row = [2] * start + word + [2] * (2 * BLOCK)
        output = checked(edge([row], length=5))
        assert output.counts[0, 2] == 1 and output.tokens[0, start : start + 2].tolist() == [9, 2]


def test_adjacent_words_each_keep_their_own_label(checked: Run) -> None:
    row = [2, 1, 11, 1, 11, 1, 11, 3, 4, 5]
    output = checked(edge([row], (8, 18, 18), length=2))
    assert output.tokens.tolist() == [[2, 8, 18, 18, 8, 18, 18, 8, 18]]
    assert output.labels.tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 0]]


@slow_interpreted
@pytest.mark.parametrize("label_mode", fewer_interpreted(LABEL_MODES, "codeswitch", "mix"))
def test_growth_is_cut_and_shrinking_is_padded(checked: Run, label_mode: str) -> None:
    row = [1, 11, 12, 1, 11, 12, 1, 11, 12, 2]
    grown = checked(edge([row], (8,) * 5, length=3, label_mode=label_mode))
    assert grown.tokens.tolist() == [[8] * 9]
    assert grown.counts.tolist() == [[2, 2, 2, 0, 1, 0, 2]]
    shrunk = checked(edge([row], (8,), length=3, label_mode=label_mode, pad_id=10))
    assert shrunk.tokens.tolist() == [[8, 8, 8, 2, 10, 10, 10, 10, 10]]
    assert shrunk.loss_mask[0, 3:].tolist() == [0] * 6
    assert shrunk.counts.tolist() == [[4, 3, 3, 5, 0, 0, 3]]
    longer_than_sequence = checked(edge([row], (8,) * 255, length=3, label_mode=label_mode))
    assert longer_than_sequence.tokens.tolist() == [[8] * 9]
    all_of_it = checked(edge([[2, 1, 2]], (8,) * 255, label_mode=label_mode))
    assert all_of_it.tokens.tolist() == [[2, 8]]
    longest = checked(edge([[2, 1, *[2] * 260]], (8,) * 255, label_mode=label_mode))
    assert longest.tokens.tolist() == [[2, *[8] * 255, *[2] * 5]]


@pytest.mark.parametrize("label_mode", LABEL_MODES)
def test_a_word_after_the_last_position_is_its_label(checked: Run, label_mode: str) -> None:
    output = checked(edge([[2] * 6 + [1, 2, 2]], (8, 18), sequence_length=6, label_mode=label_mode))
    assert output.tokens.tolist() == [[2] * 6] and output.counts[0, 1:3].tolist() == [0, 0]


def test_lookahead_fills_shorter_sequences(checked: Run) -> None:
    row = [1, 11, 12, 1, 11, 12, 1, 11, 12, 2, 3, 4, 5, 6, 7, 8]
    output = checked(edge([row], (8,), length=3, sequence_length=9, pad_id=10))
    assert output.tokens.tolist() == [[8, 8, 8, 2, 3, 4, 5, 6, 7]]
    assert output.labels.tolist() == [[1, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert output.counts[0, 3:5].tolist() == [0, 0]


def test_end_of_document_positions_are_masked_on_request(checked: Run) -> None:
    row = [1, 2, EOD, 1, 2, EOD, 2]
    plain = checked(edge([row]))
    masked = checked(edge([row], eod_id=EOD, mask_eod=True))
    assert plain.loss_mask.tolist() == [[1] * 6]
    assert masked.loss_mask.tolist() == [[1, 1, 0, 1, 1, 0]]
    assert masked.tokens.tolist() == [[9, 2, EOD, 9, 2, EOD]]
    # a translation of two tokens after the end of a document: only the first follows the end-of-document token
    translated = checked(edge([[EOD, 1, 2, 3]], (8, 18), eod_id=EOD, mask_eod=True, label_mode="codeswitch"))
    assert translated.loss_mask.tolist() == [[0, 1, 1]]


def test_positions_restart_in_every_document(checked: Run) -> None:
    row = [2, EOD, 1, 2, EOD, EOD, 3, 1, 11, 2]
    output = checked(edge([row], (8, 18), eod_id=EOD, reset_at_eod=True))
    assert output.tokens.tolist() == [[2, EOD, 8, 18, 2, EOD, EOD, 3, 1]]
    assert output.document_starts.tolist() == [[0, 0, 2, 2, 2, 2, 6, 7, 7]]
    assert output.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 0, 1]]
    shrunk = checked(edge([[2, EOD, 1, 11, 12, 2]], (8,), length=3, eod_id=EOD, reset_at_eod=True))
    assert shrunk.document_starts.tolist() == [[0, 0, 2, 2, 4]]


def test_a_document_spans_many_blocks(checked: Run) -> None:
    row = [1, EOD, *[2] * (2 * BLOCK)] * 3
    output = checked(edge([row], (8, 18, 18), eod_id=EOD, reset_at_eod=True))
    assert output.document_starts.unique().tolist() == [0, 4, 2 * BLOCK + 8, 4 * BLOCK + 12]


def test_a_token_that_ends_in_a_non_letter_opens_a_word(checked: Run) -> None:
    flags = [3, 3, 0, 2, 0, 1]
    dictionary = Dictionary(flags, [0.0, 1.0], {(0, (2,)): [(1, (4,), 1.0)]})
    # 2 opens a word after 3 (ends in a non-letter), not after 4
    output = checked(Case([[5, 3, 2, 5, 4, 2, 5]], dictionary, {}))
    assert output.tokens.tolist() == [[5, 3, 4, 5, 4, 2]]


def test_word_starts_of_the_bitmap_cut_words(checked: Run) -> None:
    row = [2, 11, 12, 13, 14, 2, 3]
    dictionary = Dictionary(EDGE_FLAGS, [0.0, 1.0], {(0, (12, 13)): [(1, (9,), 1.0)]})
    without = checked(Case([row], dictionary, {}))
    starts = [[False, False, True, False, True, False, False]]
    with_bitmap = checked(Case([row], dictionary, {}, word_starts=starts))
    assert without.tokens.tolist() == [row[:-1]]
    assert with_bitmap.tokens.tolist() == [[2, 11, 9, 14, 2, 3]]
    first = checked(Case([[12, 13, 2, 2]], dictionary, {}, word_starts=[[True, False, False, False]]))
    assert first.tokens.tolist() == [[9, 2, 2]]


def test_a_token_may_end_its_word(checked: Run) -> None:
    flags = [*EDGE_FLAGS[:19], 2, 0]
    keys = {(0, (11, 12)): [(1, (8,), 1.0)], (0, (1, 11, 19)): [(1, (9,), 1.0)]}
    output = checked(Case([[19, 11, 12, 1, 11, 19, 11, 12, 2]], Dictionary(flags, [0.0, 1.0], keys), {}))
    assert output.tokens[0, :5].tolist() == [19, 8, 9, 8, 2]


def test_sequences_of_unknown_or_other_languages_are_unchanged(checked: Run) -> None:
    output = checked(edge([[1, 1, 1, 2]] * 3, language=[0, 1, -1]))
    assert output.tokens.tolist() == [[9, 9, 9], [1, 1, 1], [1, 1, 1]]


def test_ratio_zero_and_no_known_word_are_the_identity(checked: Run) -> None:
    row = [2, 1, 11, 12, 1, 3, EOD, 1, 2]
    for case in (edge([row], thresholds=[[0, 0]] * 2), edge([row], length=4)):
        for mode in LABEL_MODES:
            output = checked(case.but(label_mode=mode))
            assert output.tokens.tolist() == [row[:-1]] and output.labels.tolist() == [row[1:]]
            assert bool((output.loss_mask == 1).all())


def test_threshold_limits() -> None:
    assert (ratio_threshold(0.0), ratio_threshold(0.5), ratio_threshold(1.0)) == (0, 1 << 31, 1 << 32)
    for wrong in (-0.01, 1.01, float("nan")):
        with user_error("ratio", wrong, "0 to 1", kind=ValueError):
            ratio_threshold(wrong)


def test_threshold_is_exclusive_and_of_the_language_pair(checked: Run) -> None:
    drawn = philox((0, 0, 0, 0), (7, 0))[0]
    for threshold, tokens in ((drawn, [[1]]), (drawn + 1, [[9]])):
        thresholds = [[1 << 32, threshold], [1 << 32, 1 << 32]]
        assert checked(edge([[1, 2]], thresholds=thresholds)).tokens.tolist() == tokens


@slow_interpreted
@pytest.mark.parametrize("ratio", fewer_interpreted([0.05, 0.5], 0.05))
def test_rate_is_the_ratio(checked: Run, ratio: float) -> None:
    output = checked(edge(MANY, thresholds=[[0, ratio_threshold(ratio)]] * 2))
    running, known, switched, *_ = output.counts.sum(0).tolist()
    assert running == known == DRAWS
    # 5 standard deviations of a binomial: fails by chance once in two million seeds
    assert abs(switched - ratio * known) < 5 * (known * ratio * (1 - ratio)) ** 0.5


@slow_interpreted
def test_target_languages_follow_weights_and_own_ratios(checked: Run) -> None:
    dictionary = Dictionary(EDGE_FLAGS, [0.0, 1.0, 3.0, 0.0], {(0, (1,)): [(n, (5 + n,), 1.0) for n in (1, 2, 3)]})
    case = Case(MANY, dictionary, {})
    counts = checked(case).counts.sum(0).tolist()
    known = counts[1]
    assert counts[5] == counts[8] == 0 and counts[6] + counts[7] == counts[2] == known
    # 5 standard deviations of a binomial with p = 1/4
    assert abs(counts[6] - known / 4) < 5 * (known * 3 / 16) ** 0.5
    own = checked(case.but(thresholds=[[0, 1 << 32, 0, 0]] * 4)).counts.sum(0).tolist()
    assert own[2] == own[6] == counts[6]


@slow_interpreted
@pytest.mark.parametrize("languages", fewer_interpreted([2, 8, 9, 20], 8, 9))
def test_any_number_of_target_languages_is_counted(checked: Run, languages: int) -> None:
    keys = {(0, (1,)): [(n, (2 + n % 8,), 1.0) for n in range(languages)]}
    case = Case(MANY, Dictionary(EDGE_FLAGS, [1.0] * languages, keys), {})
    counts = checked(case).counts.sum(0).tolist()
    assert len(counts) == 5 + languages and min(counts[5:]) > 0 and sum(counts[5:]) == counts[2] == DRAWS


@slow_interpreted
@pytest.mark.parametrize("languages", fewer_interpreted([8, 9, 20], 20))
def test_every_language_has_its_count_and_its_threshold(checked: Run, languages: int) -> None:
    keys = {(0, (1,)): [(target, (2,), 1.0) for target in range(languages)]}
    case = Case([[1] * 257], Dictionary(EDGE_FLAGS, [1.0] * languages, keys), {})
    assert bool((checked(case).counts[0, 5:] > 0).all())
    last = checked(case.but(thresholds=[[0] * (languages - 1) + [1 << 32]] * languages)).counts[0].tolist()
    assert last[2] == last[-1] > 0


@slow_interpreted
def test_candidates_follow_their_weights(checked: Run) -> None:
    dictionary = Dictionary(EDGE_FLAGS, [0.0, 1.0], {(0, (1,)): [(1, (5,), 1.0), (1, (6,), 0.0), (1, (7,), 3.0)]})
    output = checked(Case(MANY, dictionary, {}))
    drawn = [int((output.tokens == token).sum()) for token in (5, 6, 7)]
    assert drawn[1] == 0 and sum(drawn) == DRAWS
    # 5 standard deviations of a binomial with p = 1/4
    assert abs(drawn[0] - sum(drawn) / 4) < 5 * (sum(drawn) * 3 / 16) ** 0.5


def test_the_last_draw_of_a_candidate_is_inclusive(implementation: Callable[..., CodeSwitchOutput]) -> None:
    drawn = philox((0, 0, 0, 0), (7, 0))[1]
    dictionary = Dictionary(EDGE_FLAGS, [0.0, 1.0], {(0, (1,)): [(1, (8,), 1.0), (1, (9,), 1.0)]})
    arguments = Case([[1, 2]], dictionary, {}, device=DEVICE).arguments()
    table = arguments["table"]
    for last, token in ((drawn, 8), (drawn - 1, 9)):
        candidate_last = table.candidate_last.clone()
        candidate_last[0] = last - DRAW_BIAS
        output = implementation(**{**arguments, "table": table._replace(candidate_last=candidate_last)})
        assert output.tokens.tolist() == [[token]]


@slow_interpreted
def test_a_sequence_does_not_depend_on_its_batch(checked: Run) -> None:
    case = mixed_case()
    full = checked(case)
    assert full.counts[:, 2].min() > 3
    order = [4, 1, 5, 0]
    part = checked(
        case.but(rows=[case.rows[i] for i in order], sample_id=[case.sample_id[i] for i in order], language=[0] * 4)
    )
    for one, other in zip(full, part, strict=True):
        assert one is other is None or torch.equal(one[order], other)
    # more lookahead only changes the end of the sequence
    longer = checked(case.but(rows=[[*row, 5, 6, 7] for row in case.rows], sequence_length=len(case.rows[0]) - 1))
    assert torch.equal(longer.tokens[:, :30], full.tokens[:, :30])


@slow_interpreted
def test_seed_and_sample_id_decide(checked: Run) -> None:
    case = edge([[1] * 65] * 2, sample_id=[3, 4], thresholds=[[0, 1 << 31]] * 2)
    first = checked(case)
    assert torch.equal(first.tokens, checked(case).tokens)
    assert not torch.equal(first.tokens[0], first.tokens[1])
    other_ids = {"sample_id": [3 + (1 << 32), 4 + (1 << 32)]}
    for changed in ({"seed": 8}, {"seed": 7 + (1 << 32)}, other_ids):
        assert not torch.equal(first.tokens[0], checked(case.but(**changed)).tokens[0])


@slow_interpreted
@pytest.mark.parametrize("block", fewer_interpreted([16, 32, 64, 128], 16, 128))
def test_block_size_does_not_change_the_result(block: int) -> None:
    if "reference" in IMPLEMENTATIONS:
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    case = mixed_case().but(eod_id=None, device=DEVICE)
    case = case.but(rows=[[*row, *row[:-1]] for row in case.rows], sequence_length=100)
    expected = code_switch_reference(**case.arguments())
    for form in ("row", "blocks"):
        output = launch_code_switch(**case.arguments(), form=form, shape=LaunchShape(block, 4))
        for one, other in zip(expected, output, strict=True):
            assert one is other is None or torch.equal(one, other)


@slow_interpreted
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_outputs_are_written_completely_and_within_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output is initialised to an invalid value, between two margins that must not be written to."""
    if name == "reference":
        pytest.skip("writes through torch only")
    bad, margin = -7, 4096
    allocated: list[tuple[torch.Tensor, int]] = []

    new_empty = torch.Tensor.new_empty

    def guarded(self: torch.Tensor, size: tuple[int, ...], **options: Any) -> torch.Tensor:
        dtype = options.get("dtype")
        if dtype is None:  # torch's own
            return new_empty(self, size, **options)
        count = torch.Size(size).numel()
        buffer = torch.full((count + 2 * margin,), bad, dtype=dtype, device=self.device)
        allocated.append((buffer, count))
        return buffer[margin : margin + count].view(size)

    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(cases(max_rows=3, max_sequence=24))
    def check(case: Case) -> None:
        arguments = case.but(device=DEVICE).arguments()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", guarded)
            output = IMPLEMENTATIONS[name](**arguments)
        assert all(bool((each >= 0).all()) for each in output if each is not None)
        assert len(allocated) >= 5
        for buffer, count in allocated:
            assert bool((buffer[:margin] == bad).all()) and bool((buffer[margin + count :] == bad).all())
        allocated.clear()

    check()


def test_inputs_are_unchanged(implementation: Callable[..., CodeSwitchOutput]) -> None:
    case = mixed_case().but(word_starts=[[False] * 61] * 6, device=DEVICE)
    arguments = case.arguments()
    before = [each.clone() for each in (*arguments["batch"], arguments["thresholds"])]
    table_before = [each.clone() for each in arguments["table"].tensors]
    implementation(**arguments)
    after = [*arguments["batch"], arguments["thresholds"]]
    pairs = [*zip(before, after, strict=True), *zip(table_before, arguments["table"].tensors, strict=True)]
    assert all(torch.equal(one, other) for one, other in pairs)


def test_empty_batch(implementation: Callable[..., CodeSwitchOutput]) -> None:
    arguments = edge([[1, 2, 3]], device=DEVICE).arguments()
    empty = {"batch": CodeSwitchBatch(*(each if each is None else each[:0] for each in arguments["batch"]))}
    output = implementation(**{**arguments, **empty})
    assert output.tokens.shape == (0, 2) and output.counts.shape == (0, 7)

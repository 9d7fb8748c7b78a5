"""`CodeSwitcher`: batches from a recipe section and a dictionary table."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.messages import assert_facts, user_error

from megatron_prealign.code_switch.switcher import CodeSwitcher, SequenceFormat, SwitchedBatch, plain_batch
from megatron_prealign.dictionary.switchable import switchable_table
from megatron_prealign.dictionary.table import DictionaryTable, load_table
from megatron_prealign.recipe import CodeSwitchSection

EOD = 0
# tokens 1..4 are English words, 5..6 German, 7..8 Chinese; 1 -> de 5 6, 2 -> de 6 and zh 7, 3 -> zh 8 7
LANGUAGES = ("en", "de", "zh")


def ragged(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([each for row in rows for each in row], dtype=np.int32),
        np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64),
    )


@pytest.fixture
def table(tmp_path) -> DictionaryTable:
    key_tokens, key_offsets = ragged([[1], [2], [3]])
    candidate_tokens, candidate_offsets = ragged([[5, 6], [6], [7], [8, 7]])
    word_tokens, word_offsets = ragged([[1], [5, 6], [2], [6], [7], [3], [8, 7]])
    text, text_offsets = ragged([list(word.encode()) for word in ("one", "eins", "two", "zwei", "er", "three", "san")])
    built = DictionaryTable(
        languages=LANGUAGES,
        tokenizer_fingerprint="sha256:0",
        vocab_size=10,
        word_boundary=np.array([3, 5, 5, 5, 5, 5, 5, 5, 5, 5], dtype=np.uint8),
        key_tokens=key_tokens,
        key_offsets=key_offsets,
        key_language=np.zeros(3, dtype=np.int16),
        key_group=np.arange(3, dtype=np.int32),
        key_form=np.full(3, 4, dtype=np.uint8),
        key_candidate_offsets=np.array([0, 1, 3, 4]),
        candidate_tokens=candidate_tokens,
        candidate_offsets=candidate_offsets,
        candidate_language=np.array([1, 1, 2, 2], dtype=np.int16),
        candidate_weight=np.ones(4, dtype=np.float32),
        word_tokens=word_tokens,
        word_offsets=word_offsets,
        word_language=np.array([0, 1, 0, 1, 2, 0, 2], dtype=np.int16),
        word_text=text.astype(np.uint8),
        word_text_offsets=text_offsets,
        group_offsets=np.array([0, 2, 5, 7]),
        group_count=np.ones(3, dtype=np.int64),
    )
    built.save(tmp_path / "table.safetensors")
    return load_table(tmp_path / "table.safetensors")


def switcher(
    table: DictionaryTable, seq_length: int, languages: tuple[str, ...] = ("en",), **fields: object
) -> CodeSwitcher:
    options = {"seed": 1, "device": "cpu", "coverage": None}
    options |= {name: fields.pop(name) for name in list(fields) if name in options}
    sequence_format = {"seq_length": seq_length, "eod_id": EOD}
    sequence_format |= {name: fields.pop(name) for name in list(fields) if name in SequenceFormat.__dataclass_fields__}
    section = CodeSwitchSection(**{"ratio": 1.0, **fields})
    table = switchable_table(table, section, languages)
    return CodeSwitcher(table, section, SequenceFormat(**sequence_format), languages=languages, **options)


def call(
    switch: CodeSwitcher, rows: list[list[int]], language: list[int] | None = None, consumed: int = 0
) -> SwitchedBatch:
    return switch(torch.tensor(rows), torch.tensor(language or [0] * len(rows)), torch.arange(len(rows)), consumed)


def test_words_are_switched_and_counted(table: DictionaryTable) -> None:
    batch = call(switcher(table, 6, language_weights={"de": 1.0}), [[4, 1, 3, 2, 4, 4, 4]])
    assert batch.tokens.tolist() == [[4, 5, 6, 3, 6, 4]]
    assert batch.labels.tolist() == [[1, 0, 3, 2, 4, 4]]
    assert batch.loss_mask.tolist() == [[1, 0, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    # 3 is unknown, since it only has Chinese translations
    assert batch.counts is not None and batch.counts.tolist() == [5, 2, 2, 0, 1, 0, 2, 0]


def test_equal_language_weights_by_default(table: DictionaryTable) -> None:
    batch = call(switcher(table, 2000), [[2] * 2001])
    assert batch.counts is not None
    known, switched, _, _, english, german, chinese = batch.counts.tolist()[1:]
    assert known == switched == german + chinese == 2000 and english == 0
    # 2000 fair coins: 5 standard deviations
    assert abs(german - 1000) < 112


def test_language_indices_are_those_of_the_data(table: DictionaryTable) -> None:
    switch = switcher(table, 2, languages=("zh", "en", "fi"))
    batch = call(switch, [[1, 1, 1]] * 4, language=[0, 1, 2, -1])
    assert batch.tokens.tolist() == [[1, 1], [5, 6], [1, 1], [1, 1]]


def test_ratio_follows_the_schedule(table: DictionaryTable) -> None:
    switch = switcher(table, 1000, ratio=0.0, schedule="linear", final_ratio=1.0, schedule_tokens=100)
    rows = [[1] * 1001]

    def rate(consumed: int) -> float:
        batch = call(switch, rows, consumed=consumed)
        return 0.0 if batch.counts is None else int(batch.counts[2]) / int(batch.counts[1])

    assert [rate(0), rate(100), rate(0)] == [0.0, 1.0, 0.0]
    # 5 standard deviations of about 800 draws with p = 0.25
    assert abs(rate(25) - 0.25) < 0.08


def test_resumed_switcher_continues_equally(table: DictionaryTable) -> None:
    fields = {"ratio": 0.3, "schedule": "cosine", "final_ratio": 0.7, "schedule_tokens": 1000, "label_mode": "mix"}
    through, resumed = switcher(table, 119, **fields), switcher(table, 119, **fields)
    rows = [[1, 2, 3, 4] * 30] * 3
    for consumed in range(0, 500, 100):
        last = call(through, rows, consumed=consumed)
    again = call(resumed, rows, consumed=400)
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(last, again, strict=True))


def test_end_of_document_masked_on_request(table: DictionaryTable) -> None:
    rows = [[1, EOD, 4, 4]]
    assert call(switcher(table, 3, language_weights={"zh": 1.0}, ratio=0.0), rows).loss_mask.tolist() == [[1, 1, 1]]
    masked = call(switcher(table, 3, mask_eod=True, language_weights={"zh": 1.0}), rows)
    assert masked.loss_mask.tolist() == [[1, 0, 1]]


def test_dropped_groups_are_not_switched(table: DictionaryTable) -> None:
    kept = table.without_groups(np.array([True, False, False]))
    batch = call(switcher(kept, 2, language_weights={"de": 1.0}), [[1, 2, 4]])
    assert batch.tokens.tolist() == [[1, 6]]


def test_languages_that_the_table_lacks(table: DictionaryTable) -> None:
    with user_error("language_weights has fi, sv,", ": en, de, zh;"):
        switcher(table, 3, language_weights={"fi": 1.0, "de": 1.0, "sv": 1.0})
    with user_error("language_ratios has fi,"):
        switcher(table, 3, language_ratios={"fi": 0.1})
    with user_error("no word would be switched", "words of en,", "data is in de, zh;"):
        switcher(table, 3, languages=("de", "zh"))


def test_table_with_end_of_document_in_a_key(table: DictionaryTable) -> None:
    broken = replace(table, key_tokens=np.array([1, EOD, 3], dtype=np.int32))
    with user_error(table.path, "key_tokens[1]", "special token 0"):
        switcher(broken, 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plain_batch(dtype: torch.dtype) -> None:
    tokens = torch.tensor([[1, EOD, 3, 4, 9, 9], [5, 6, 7, EOD, 9, 9]], dtype=dtype)
    batch = plain_batch(tokens, SequenceFormat(seq_length=3, eod_id=EOD, mask_eod=True))
    assert batch.tokens.tolist() == [[1, EOD, 3], [5, 6, 7]]
    assert batch.labels.tolist() == [[EOD, 3, 4], [6, 7, EOD]]
    assert batch.loss_mask.tolist() == [[1, 0, 1], [1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2]] * 2
    assert batch.counts is None and batch.document_starts is None
    assert bool((plain_batch(tokens, SequenceFormat(seq_length=3, eod_id=EOD)).loss_mask == 1).all())
    assert [each.dtype for each in batch[:4]] == [torch.int64, torch.int64, torch.float32, torch.int64]


@pytest.mark.parametrize("reset_position_ids", [False, True])
@pytest.mark.parametrize("reset_attention_mask", [False, True])
def test_documents_are_separated_with_and_without_switching(
    table: DictionaryTable, reset_position_ids: bool, reset_attention_mask: bool
) -> None:
    resets = {"reset_position_ids": reset_position_ids, "reset_attention_mask": reset_attention_mask}
    # no word in these rows is known, so both give the same
    rows = [[4, EOD, 4, 4, EOD, EOD, 4, 4, 4]]
    switched = call(switcher(table, 8, **resets), rows)
    plain = plain_batch(torch.tensor(rows), SequenceFormat(seq_length=8, eod_id=EOD, **resets))
    positions = [0, 1, 0, 1, 2, 0, 0, 1] if reset_position_ids else list(range(8))
    starts = [[0, 0, 2, 2, 2, 5, 6, 6]] if reset_attention_mask else None
    for batch in (switched, plain):
        assert batch.position_ids.tolist() == [positions]
        assert (None if batch.document_starts is None else batch.document_starts.tolist()) == starts
    assert switched.counts is not None


def test_ratio_zero_gives_the_plain_batch_without_a_launch(
    table: DictionaryTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_prealign.code_switch.switcher.code_switch", None)
    rows = [[1, 2, EOD, 3, 4]] * 2
    switched = call(switcher(table, 4, ratio=0.0, mask_eod=True), rows)
    plain = plain_batch(torch.tensor(rows), SequenceFormat(seq_length=4, eod_id=EOD, mask_eod=True))
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(switched, plain, strict=True))


def test_lookahead_fills_the_sequence(table: DictionaryTable) -> None:
    shrinking = replace(
        table,
        key_tokens=np.array([1, 8, 2, 3], dtype=np.int32),
        key_offsets=np.array([0, 2, 3, 4]),
        word_boundary=np.array([3, 5, 5, 5, 5, 5, 5, 5, 4, 5], dtype=np.uint8),
        candidate_tokens=np.array([5, 6, 7, 8, 7], dtype=np.int32),
        candidate_offsets=np.array([0, 1, 2, 3, 5]),
    )
    padded = call(switcher(shrinking, 4), [[1, 8, 1, 8, 4]])
    filled = call(switcher(shrinking, 4), [[1, 8, 1, 8, 4, 9, 4]])
    assert padded.tokens.tolist() == [[5, 5, 4, EOD]] and padded.loss_mask.tolist() == [[1, 1, 0, 0]]
    assert filled.tokens.tolist() == [[5, 5, 4, 9]] and filled.labels.tolist() == [[1, 4, 9, 4]]


def test_ratio_of_words_divides_by_the_coverage_of_the_language(table: DictionaryTable) -> None:
    fields = {"ratio": 0.2, "ratio_of": "words", "languages": ("en", "de")}
    switch = switcher(table, 4000, coverage={"en": 0.5, "de": 0.1}, **fields)
    # every second word is known
    batch = call(switch, [[1, 4] * 2001])
    running, known, switched, *_ = batch.counts.tolist()
    assert abs(known / running - 0.5) < 0.01
    # 5 standard deviations of 1,700 draws with p = 0.4
    assert abs(switched / running - 0.2) < 0.03
    everything = call(switcher(table, 4000, coverage={"en": 0.1}, **fields), [[1, 4] * 2001])
    assert everything.counts[1] == everything.counts[2]


def test_coverage_of_the_language_of_the_sequence(table: DictionaryTable) -> None:
    german = replace(table, key_language=np.ones(3, dtype=np.int16))
    fields = {"ratio_of": "words", "languages": ("en", "de")}
    switched = call(switcher(german, 2, coverage={"de": 1.0}, **fields), [[1, 4, 4]] * 2, language=[0, 1])
    assert switched.tokens.tolist() == [[1, 4], [5, 6]]
    assert call(switcher(german, 2, coverage={"de": 0.0}, **fields), [[1, 4, 4]], language=[1]).counts is None


def test_ratio_of_words_above_the_coverage_is_logged(table: DictionaryTable, caplog) -> None:
    switcher(table, 4, ratio=0.2, ratio_of="words", coverage={"en": 0.1})
    (message,) = caplog.messages
    assert_facts(message, "code_switch.ratio", "0.2 of the running words", "10.0%", "in en;")
    caplog.clear()
    # German is not a source language: none of its words would be switched anyway
    switcher(table, 4, languages=("en", "de"), ratio=0.2, ratio_of="words", coverage={"en": 0.2, "de": 0.0})
    assert not caplog.text


def test_word_starts_reach_the_kernel(table: DictionaryTable) -> None:
    chinese = replace(table, word_boundary=np.array([3, 4, 4, 4, 4, 4, 4, 4, 4, 4], dtype=np.uint8))
    switch = switcher(chinese, 4, language_weights={"de": 1.0})
    tokens = torch.tensor([[4, 1, 2, 4, 4]])
    starts = torch.tensor([[True, True, True, True, False]])
    without = switch(tokens, torch.tensor([0]), torch.tensor([0]), 0)
    assert without.tokens.tolist() == [[4, 1, 2, 4]]
    assert switch(tokens, torch.tensor([0]), torch.tensor([0]), 0, starts).tokens.tolist() == [[4, 5, 6, 6]]


def test_the_section_chooses_keys(table: DictionaryTable) -> None:
    batch = call(switcher(table, 3, max_word_length=3), [[3, 1, 4, 4]])
    # "three" is too long
    assert batch.counts.tolist()[1:3] == [1, 1] and batch.tokens.tolist() == [[3, 5, 6]]


@pytest.mark.parametrize(
    ("label_mode", "labels"), [("input_only", [1, 0, 4]), ("codeswitch", [5, 6, 4]), ("no_predict", [0, 0, 4])]
)
def test_the_section_chooses_labels(table: DictionaryTable, label_mode: str, labels: list[int]) -> None:
    assert call(switcher(table, 3, label_mode=label_mode), [[4, 1, 4, 4]]).labels.tolist() == [labels]


def test_draws_depend_on_the_seed(table: DictionaryTable) -> None:
    rows = [[1] * 101] * 2
    first, again, other = (call(switcher(table, 100, ratio=0.5, seed=seed), rows) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    # of both rows
    assert first.counts.tolist()[2] == int((first.tokens == 5).sum())

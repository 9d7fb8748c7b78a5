"""Coverage of running words, compared with counts by hand and with a plain loop."""

from dataclasses import replace

import numpy as np
import pytest
from support.dictionary_files import add_entries
from support.messages import user_error

from megatron_prealign.data.word_bitmap import words_path
from megatron_prealign.dictionary import coverage as coverage_module
from megatron_prealign.dictionary.build import BuildSettings, build_table
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.coverage import (
    blend_coverage,
    count_groups,
    match_words,
    measure_coverage,
    split_words,
)
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.recipe import DataSource


def build(tokenizer, pairs, languages=("en", "de")):
    builder = GroupBuilder()
    add_entries(builder, pairs, languages)
    return build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())


def test_counted_by_hand(tokenizer, make_dataset):
    table = build(tokenizer, [["apple", "Apfel"], ["house", "Haus"], ["the", "der"], ["app", "App"]])
    documents = [
        'The apple, (apple) and "Apple" - APPLE! apples 123 apple',
        "apple\nhouse. 42 houses",
        "the",
    ]
    # Known: The apple apple Apple APPLE apple | apple house | the. Unknown: and apples houses. Not words: - 123 42 etc.
    coverage = measure_coverage(table, make_dataset(tokenizer, documents, "en"))
    assert (coverage.known_words, coverage.running_words) == (9, 12)
    assert coverage.share == 0.75
    assert count_groups(table, [coverage]).group_count.tolist() == [6, 1, 2, 0]
    assert count_groups(table, [coverage, coverage]).group_count.tolist() == [12, 2, 4, 0]


def test_a_key_without_a_letter_is_no_running_word(tokenizer, make_dataset):
    table = build(tokenizer, [["apple", "Apfel"]])
    no_letters = replace(table, word_boundary=table.word_boundary & 3)
    coverage = measure_coverage(no_letters, make_dataset(tokenizer, ["apple"], "en"))
    assert (coverage.known_words, coverage.running_words) == (0, 0)


def test_only_the_source_language_counts(tokenizer, make_dataset):
    table = build(tokenizer, [["apple", "Apfel"]])
    german = measure_coverage(table, make_dataset(tokenizer, ["apple Apfel"], "de"))
    assert (german.known_words, german.running_words) == (0, 2)
    french = measure_coverage(table, make_dataset(tokenizer, ["apple"], "fr"))
    assert (french.known_words, french.running_words, french.share) == (0, 1, 0.0)


def test_another_tokenizer_is_rejected(tokenizer, clone_tokenizer, make_dataset):
    table = build(tokenizer, [["apple", "Apfel"]])
    prefix = make_dataset(clone_tokenizer, ["apple"], "en")
    with user_error(tokenizer.fingerprint, clone_tokenizer.fingerprint, f"dataset {prefix}"):
        measure_coverage(table, prefix)


def test_a_sample_of_a_larger_corpus(tokenizer, make_dataset):
    table = build(tokenizer, [["apple", "Apfel"]])
    prefix = make_dataset(tokenizer, ["apple house"] * 200, "en")
    full = measure_coverage(table, prefix)
    assert (full.known_words, full.running_words) == (200, 400)
    sample = measure_coverage(table, prefix, max_tokens=full.tokens // 4)
    assert sample.tokens == full.tokens // 4
    # Truncation may split one word.
    assert abs(sample.running_words - 100) <= 1 and abs(sample.known_words - 50) <= 1
    # A document longer than the limit is truncated.
    assert measure_coverage(table, prefix, max_tokens=1).tokens == 1
    with user_error("--max-tokens is 0"):
        measure_coverage(table, prefix, max_tokens=0)


def test_blend_coverage_weights_its_sources(tokenizer, make_dataset):
    table = build(tokenizer, [["apple", "Apfel"], ["house", "Haus"]])
    paths = {}
    for name, language, text in (
        ("a", "en", "apple house"),
        ("b", "en", "apple street street street"),
        ("c", "de", "Haus"),
    ):
        prefix = make_dataset(tokenizer, [text], language)
        paths[name] = str(prefix.with_name(name))
        for ending in ("bin", "idx", "json"):
            prefix.with_name(f"{prefix.name}.{ending}").rename(f"{paths[name]}.{ending}")
    sources = [
        DataSource(path=paths["a"], language="en", weight=3.0),
        DataSource(path=paths["b"], language="en", weight=1.0),
        DataSource(path=paths["c"], language="de"),
    ]
    # Coverage is 1 in the first source and a quarter in the second.
    assert blend_coverage(table, sources) == {"en": 3 / 4 * 1 + 1 / 4 * 1 / 4, "de": 0.0}


def test_missing_corpus(tokenizer, tmp_path):
    with user_error(tmp_path / "none.json", "not found"):
        measure_coverage(build(tokenizer, [["apple", "Apfel"]]), tmp_path / "none")


CHINESE = [["苹果", "apple"], ["银行", "bank"], ["房子", "house"], ["子", "child"]]


def test_segmented_words(tokenizer, make_dataset):
    table = build(tokenizer, CHINESE, ("zh", "en"))
    documents = ["我爱苹果和银行.苹果树 房子", "苹果", "银行银行,x"]
    # Split at spaces and punctuation: 我爱苹果和银行 | 苹果树 | 房子 || 苹果 || 银行银行 | x.
    without = measure_coverage(table, make_dataset(tokenizer, documents, "zh"))
    assert (without.known_words, without.running_words) == (2, 6)
    # 我 爱 苹果 和 银行 | 苹果 树 | 房子 || 苹果 || 银行 银行 | x.
    marked = make_dataset(tokenizer, documents, "zh", "support.word_cutters:KnownWords")
    coverage = measure_coverage(table, marked)
    assert (coverage.known_words, coverage.running_words) == (7, 12)
    assert count_groups(table, [coverage]).group_count.tolist() == [3, 3, 1, 0]
    # The first document and its bits are truncated.
    assert measure_coverage(table, marked, max_tokens=1).running_words == 1
    words_path(marked).unlink()
    with user_error("words_zh.words", "not found"):
        measure_coverage(table, marked)


@pytest.mark.slow
def test_real_chinese_words(tokenizer, make_dataset):
    pytest.importorskip("jieba", reason="jieba is not installed (pip install 'megatron-prealign[segmenters]')")
    table = build(tokenizer, [["学习", "learn"], ["系统", "system"], ["动", "move"]], ("zh", "en"))
    documents = ["我们学习手动创建系统.", "我们学习,我们安装系统"]
    without = measure_coverage(table, make_dataset(tokenizer, documents, "zh"))
    assert (without.known_words, without.running_words) == (0, 3)
    # 我们 学习 手动 创建 系统 || 我们 学习 | 我们 安装 系统: 手动 does not match 动.
    coverage = measure_coverage(table, make_dataset(tokenizer, documents, "zh", "jieba"))
    assert (coverage.known_words, coverage.running_words) == (4, 10)


def test_bits_of_documents_sampled_from_a_larger_corpus(tokenizer, make_dataset):
    """Documents have different lengths, so that the bits of another document would not match."""
    documents = ["我" * number + "苹果银行" for number in range(1, 120)]
    marked = make_dataset(tokenizer, documents, "zh", "support.word_cutters:KnownWords")
    tokens, _, bits = coverage_module.read_sample(marked, 1000, "support.word_cutters:KnownWords", tokenizer.vocab_size)
    first = [tokenizer.encode_word(word, word_initial=False)[0] for word in ("我", "苹果", "银行")]
    assert len(bits) == len(tokens) == 1000 and 20 < bits.sum() < 980
    np.testing.assert_array_equal(bits, np.isin(tokens, [*first, tokenizer.eod_id]))


@pytest.mark.parametrize("count", [1, 2, 3, 100, 4096, 70_000, 98_304])
def test_documents_are_drawn_evenly_and_each_once(count):
    lengths = np.full(count, 10, dtype=np.int32)
    assert coverage_module._draw(lengths, 10 * count).tolist() == list(range(count))
    # All but half of the last document: every document must be drawn once.
    assert coverage_module._draw(lengths, 10 * count - 5).tolist() == list(range(count))
    for divisor in (3, 10, 50):
        drawn = coverage_module._draw(lengths, 10 * count // divisor)
        assert len(drawn) == max(-(-(10 * count // divisor) // 10), 1)
        # No gap is much longer than the mean gap, including the start and end of the corpus.
        gaps = np.diff([0, *drawn, count])
        assert gaps.max() <= 3 * -(-count // len(drawn))


def test_drawn_documents_are_deterministic():
    """Resumed runs and other machines must draw the same: computed by hand, 61 is the first step coprime to 100."""
    lengths = np.full(100, 10, dtype=np.int32)
    assert coverage_module._draw(lengths, 45).tolist() == sorted([0, 61, 22, 83, 44])


def test_draw_takes_complete_documents_until_the_limit():
    lengths = np.random.default_rng(3).integers(1, 50, 150_000).astype(np.int32)
    total = int(lengths.sum())
    for limit in (1, 1000, total // 2, total - 1):
        drawn = coverage_module._draw(lengths, limit)
        tokens = int(lengths[drawn].sum())
        assert limit <= tokens < limit + 50
        assert len(set(drawn.tolist())) == len(drawn)


@pytest.mark.parametrize("segmented", [False, True])
def test_matching_equals_a_plain_loop(tokenizer, segmented):
    """Random tokens over a small alphabet, so that keys of every length occur and overlap."""
    pairs = [[word, "Haus"] for word in ("a", "ab", "abc", "abcd", "q", "qq", "qqq", "qqqqqqqq", "x", "xq")]
    table = build(tokenizer, pairs)
    random = np.random.default_rng(7)
    choice = np.unique(np.concatenate([table.key_tokens, tokenizer.encode(" . a 1"), [tokenizer.eod_id]]))
    rows = [random.choice(choice, size=int(size)) for size in random.integers(1, 40, size=200)]
    row_starts = np.cumsum([0, *map(len, rows[:-1])])
    tokens = np.concatenate(rows)
    bits = random.random(len(tokens)) < 0.3 if segmented else None
    keys = {
        tuple(table.key_tokens[slice(*table.key_offsets[key : key + 2])].tolist()): key for key in range(table.num_keys)
    }
    expected_words, expected_keys, expected_letters = [], [], []
    position = 0
    for row in rows:
        word: list[int] = []
        for index, token in enumerate(row.tolist()):
            starts = bits is not None and bits[position]
            if index and (starts or table.word_boundary[token] & 1 or table.word_boundary[row[index - 1]] & 2):
                expected_words.append((position - len(word), len(word)))
                expected_keys.append(keys.get(tuple(word), -1))
                expected_letters.append(any(table.word_boundary[part] & 4 for part in word))
                word = []
            word.append(token)
            position += 1
        expected_words.append((position - len(word), len(word)))
        expected_keys.append(keys.get(tuple(word), -1))
        expected_letters.append(any(table.word_boundary[part] & 4 for part in word))
    words = split_words(tokens, row_starts, table.word_boundary, bits)
    assert list(zip(words.start.tolist(), words.length.tolist(), strict=True)) == expected_words
    assert words.has_letter.tolist() == expected_letters
    found = match_words(table, 0, tokens, words)
    assert found.tolist() == expected_keys
    assert (found >= 0).sum() > 50
    assert (match_words(table, 1, tokens, words) == -1).all()


def test_hash_collisions_of_keys_are_resolved(tokenizer, monkeypatch):
    table = build(tokenizer, [["apple", "Apfel"], ["house", "Haus"], ["red", "rot"]])
    tokens = np.array(tokenizer.encode("The red house, red apple"))
    words = split_words(tokens, np.zeros(1, dtype=np.int64), table.word_boundary)
    found = match_words(table, 0, tokens, words)
    assert (found >= 0).sum() == 4
    monkeypatch.setattr(
        "megatron_prealign.dictionary.coverage._hash", lambda columns: np.zeros(len(columns), dtype=np.uint64)
    )
    assert np.array_equal(match_words(table, 0, tokens, words), found)

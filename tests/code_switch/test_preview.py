"""The preview shows the inputs of training, and every switched word is a listed translation."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from support.messages import assert_facts, user_error
from support.token_datasets import open_samples, write_dataset
from support.word_cutters import WORDS
from support.word_table import word_table

from megatron_prealign.code_switch.preview import Preview, find_spans, make_preview
from megatron_prealign.code_switch.preview_text import TextStyle, render_preview, split_space
from megatron_prealign.code_switch.switcher import CodeSwitcher, SequenceFormat
from megatron_prealign.code_switch.token_text import INCOMPLETE
from megatron_prealign.dictionary.build import BuildSettings, build_table, read_groups
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.readers import parse_input
from megatron_prealign.dictionary.switchable import switchable_table
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer
from megatron_prealign.recipe import CodeSwitchSection, DataSection, DataSource
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

PAIRS = {
    "de": [
        "apple Apfel",
        "house Haus",
        "house Gebäude",
        "bank Ufer",
        "the der",
        "red rot",
        "red Red",
        "and und",
        "closed zu",
    ],
    "ja": ["apple りんご", "house 家", "bank 銀行", "red 赤い"],
    "ar": ["apple تفاحة", "house بيت", "and و"],
}
SENTENCES = [
    "The apple and the house are red, and the bank is closed.",
    "An apple (the red one) fell; THE HOUSE stands.\n\tUnknown words stay as they are, naïve or not.",
    "House, bank, Red river: 苹果 and りんご are both the apple.",
]
CHINESE = ["我在银行买苹果，房子里有水果汁。", "数据库在蓝山的房子里，苹果和银行。"]


@dataclass(frozen=True)
class Material:
    """A tokenizer, two datasets and two tables."""

    tokenizer: Tokenizer
    english: DictionaryTable
    chinese: DictionaryTable
    documents: list[str]
    directory: Path

    def data(self, language: str = "en", seq_length: int = 40) -> DataSection:
        source = DataSource(path=str(self.directory / language), language=language)
        return DataSection(
            tokenizer=str(self.tokenizer.path), sources=[source], seq_length=seq_length, validation_fraction=0.0
        )

    def preview(
        self, num_samples: int = 12, *, language: str = "en", seq_length: int = 40, **fields: object
    ) -> Preview:
        table = self.english if language == "en" else self.chinese
        section = CodeSwitchSection(**{"ratio": 0.5, **fields})
        data = self.data(language, seq_length)
        return make_preview(table, section, data, self.tokenizer, num_samples=num_samples, seed=7)


def build(directory: Path, tokenizer: Tokenizer, lists: dict[str, list[str]]) -> DictionaryTable:
    inputs = []
    for languages, pairs in lists.items():
        file = directory / f"{languages}.tsv"
        file.write_text("".join(pair.replace(" ", "\t") + "\n" for pair in pairs), encoding="utf-8")
        inputs.append(parse_input(f"{file}:{languages}", None, "auto", ""))
    report = BuildReport()
    return build_table(read_groups(inputs, report)[0], tokenizer, BuildSettings(max_target_tokens=16), report)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    directory = tmp_path_factory.mktemp("preview")
    order = np.random.default_rng(0)
    documents = {
        "en": [" ".join(order.permutation(SENTENCES)) for _ in range(30)],
        "zh": ["".join(order.permutation(CHINESE)) for _ in range(30)],
    }
    for language, texts in documents.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / f"{language}.jsonl").write_text(lines, encoding="utf-8")
    # few enough tokens that characters of other scripts need several
    train_tokenizer([directory / "en.jsonl"], directory / "tokenizer", 300, show_progress=False)
    tokenizer = load_tokenizer(directory / "tokenizer")
    for language, segmenter in (("en", None), ("zh", "support.word_cutters:KnownWords")):
        source, prefix = str(directory / f"{language}.jsonl"), str(directory / language)
        settings = PreprocessSettings(language=language, segmenter=segmenter)
        preprocess([source], str(tokenizer.path), prefix, settings, show_progress=False)
    english = build(directory, tokenizer, {f"en-{language}": pairs for language, pairs in PAIRS.items()})
    words = [f"{word} {english}" for word, english in zip(WORDS, ("apple", "bank", "house"), strict=False)]
    return Material(tokenizer, english, build(directory, tokenizer, {"zh-en": words}), documents["en"], directory)


def translations() -> dict[tuple[str, str], set[str]]:
    listed = defaultdict(set)
    for language, pairs in PAIRS.items():
        for pair in pairs:
            source, target = pair.split()
            listed[source, language].add(target.casefold())
    return listed


@pytest.mark.parametrize("label_mode", ["input_only", "codeswitch", "no_predict", "mix"])
def test_preview_shows_the_inputs_of_training(material: Material, tmp_path: Path, label_mode: str) -> None:
    preview = material.preview(label_mode=label_mode)
    section = preview.section
    samples = open_samples(
        material.data(),
        num_samples=12,
        seed=7,
        languages=["en"],
        cache_dir=tmp_path,
        lookahead=section.lookahead_tokens(40),
    )
    sequence_format = SequenceFormat(seq_length=40, eod_id=material.tokenizer.eod_id)
    table = switchable_table(material.english, section, ["en"])
    switch = CodeSwitcher(table, section, sequence_format, seed=7, languages=["en"], device="cpu")
    source = samples.batch(range(12))
    batch = switch(source.tokens, source.language, source.sample_id, 0, source.word_starts)
    assert [list(sample.tokens) for sample in preview.samples] == batch.tokens.tolist()
    labels = [[label or 0 for label in sample.labels] for sample in preview.samples]
    assert labels == batch.labels.tolist()
    scored = [[label is not None for label in sample.labels] for sample in preview.samples]
    assert scored == batch.loss_mask.bool().tolist()
    assert batch.counts is not None and preview.switched > 20
    assert np.sum([sample.counts for sample in preview.samples], axis=0).tolist() == batch.counts.tolist()


def test_marked_words_are_counted_and_listed_translations(material: Material) -> None:
    preview = material.preview(num_samples=30, ratio=0.9)
    listed, languages = translations(), material.english.languages
    seen = set()
    for sample in preview.samples:
        into = [0] * len(languages)
        for part in sample.switched:
            assert part.language is not None
            into[languages.index(part.language)] += 1
            word, translation = split_space(part.source)[1].casefold(), split_space(part.output)[1].casefold()
            if part is sample.parts[-1]:
                # may be truncated by the end of the sample
                assert any(each.startswith(translation.rstrip("…")) for each in listed[word, part.language])
            else:
                assert translation in listed[word, part.language]
            seen.add((word, part.language))
        assert into == list(sample.counts[5:]) and sum(into) == sample.counts[2]
        assert [target for target in sample.targets if target is None] == [None] * sum(
            part.output_tokens for part in sample.parts if part.language is None
        ) + [None] * sample.counts[3]
    assert seen == set(listed)
    assert sum(preview.by_language.values()) == preview.switched
    assert list(preview.by_language.values()) == sorted(preview.by_language.values(), reverse=True)


def test_unmarked_text_is_unchanged(material: Material) -> None:
    preview = material.preview(num_samples=20)
    for sample in preview.samples:
        original = "".join(part.source for part in sample.parts)
        for text in original.split("<eod>"):
            assert any(text in document for document in material.documents), text
        assert all(part.source == part.output for part in sample.parts if part.language is None)
        decoded = material.tokenizer.decode(sample.tokens[: 40 - sample.counts[3]])
        assert "".join(part.output for part in sample.parts) == decoded.strip(INCOMPLETE)


def test_padding_is_not_shown(material: Material) -> None:
    # only "closed", which becomes shorter
    shrinking = {"ratio": 1.0, "min_word_length": 6, "lookahead": 0}
    preview = material.preview(num_samples=30, **shrinking)
    unused = [40 - sum(part.output_tokens for part in sample.parts) for sample in preview.samples]
    assert preview.padded == sum(unused) > 0
    assert preview.truncated == sum(sample.counts[4] for sample in preview.samples)
    filled = material.preview(num_samples=30, **{**shrinking, "lookahead": 20})
    assert filled.padded == 0


def test_words_of_scripts_without_spaces(material: Material) -> None:
    preview = material.preview(num_samples=10, language="zh", seq_length=60, ratio=1.0)
    english = {"苹果": "apple", "银行": "bank", "房子": "house"}
    parts = [part for sample in preview.samples for part in sample.parts[:-1]]
    switched = [(part.source, part.output) for part in parts if part.language]
    assert set(switched) == set(english.items())
    kept = "".join(part.output for part in parts if not part.language)
    assert not any(word in kept for word in english) and "水果汁" in kept and INCOMPLETE not in kept


def test_totals(material: Material) -> None:
    preview = material.preview(num_samples=30, ratio=0.2)
    assert preview.positions == 1200 and preview.switched <= preview.known <= preview.running
    # 5 standard deviations of 250 draws with p = 0.2
    assert abs(preview.switched / preview.known - 0.2) < 0.13
    switched = [part for sample in preview.samples for part in sample.parts[:-1] if part.language]
    assert preview.token_lengths is not None
    before, after = preview.token_lengths
    # translations that end exactly at the end of their sample are excluded, so these two sets may differ by a few
    assert before == pytest.approx(np.mean([part.source_tokens for part in switched]), abs=0.2)
    assert after == pytest.approx(np.mean([part.output_tokens for part in switched]), abs=0.5)
    nothing = material.preview(num_samples=2, ratio=0.0)
    assert nothing.switched == 0 and nothing.token_lengths is None
    assert "no word was switched in these samples" in list(render_preview(nothing, TextStyle()))


def test_no_sample_is_repeated(material: Material) -> None:
    preview = material.preview(num_samples=10_000)
    tokens = sum(len(material.tokenizer.encode(document)) + 1 for document in material.documents)
    assert len(preview.samples) == (tokens - 1) // 40


def test_the_preview_follows_the_section(material: Material) -> None:
    kept = material.preview(num_samples=20, ratio=1.0, case="keep", language_weights={"de": 1.0})
    parts = [part for sample in kept.samples for part in sample.switched]
    words = {(split_space(part.source)[1], split_space(part.output)[1]) for part in parts}
    assert ("THE", "der") in words and ("The", "der") in words
    # in the case of the dictionary, Red would be replaced by itself
    assert ("Red", "rot") in words and ("red", "Red") in words and ("Red", "Red") not in words
    assert len(parts) == kept.switched
    long_words = material.preview(num_samples=20, ratio=1.0, min_word_length=5, language_ratios={"ja": 0.0})
    switched = [part for sample in long_words.samples for part in sample.switched]
    assert {split_space(part.source)[1].casefold() for part in switched} == {"apple", "house", "closed"}
    assert {part.language for part in switched} == {"de", "ar"}


def test_ratio_of_words(material: Material, caplog: pytest.LogCaptureFixture) -> None:
    preview = material.preview(num_samples=30, ratio=0.95, ratio_of="words")
    assert preview.switched == preview.known
    (message,) = (record.getMessage() for record in caplog.records if record.name.endswith("code_switch.switcher"))
    assert_facts(message, "code_switch.ratio", "0.95 of the running words", "in en;")
    assert "0.95 of the running words, input_only" in "\n".join(render_preview(preview, TextStyle()))


def test_spans() -> None:
    # 11 continues a translation, 12 and 13 start one
    source = [1, 2, 3, 4, 5, 6, 7]
    ends = {0: 1, 1: 3, 3: 4, 4: 5, 5: 7}
    spans = find_spans(source, [1, 12, 11, 13, 5, 12], ends, 11 - 1 + 1)
    assert [(span.source.start, span.source.stop, span.output.start, span.output.stop) for span in spans] == [
        (0, 1, 0, 1),
        (1, 3, 1, 3),
        (3, 4, 3, 4),
        (4, 5, 4, 5),
        (5, 7, 5, 6),
    ]
    assert [span.language for span in spans] == [None, 0, 1, None, 0]
    padded = find_spans([1, 2, 3], [12, 3, 0, 0], {0: 2, 2: 3}, 11)
    assert [(span.source, span.output) for span in padded] == [
        (slice(0, 2), slice(0, 1)),
        (slice(2, 3), slice(1, 2)),
    ]


class Pieces(Tokenizer):
    """A tokenizer defined by the texts of its tokens; `a` is the last one."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = [*texts, "a"]
        self.path, self.fingerprint = Path("pieces"), "sha256:0"
        self.vocab_size, self.eod_id, self.special_ids = len(self._texts), 0, frozenset({0})

    def encode(self, text: str, language: str | None = None) -> list[int]:
        return [self._texts.index(text)]

    def encode_with_offsets(self, text: str, language: str | None = None) -> tuple[list[int], np.ndarray]:
        raise NotImplementedError

    def encode_words(self, words: list[str], language: str | None = None, word_initial: bool = True) -> list[list[int]]:
        return [self.encode(word) for word in words]

    def decode(self, ids: list[int]) -> str:
        # like sentencepiece, which strips the first space
        return "".join(self._texts[index] for index in ids).removeprefix(" ")

    def word_boundaries(self) -> np.ndarray:
        raise NotImplementedError


def test_the_worked_example_of_the_method(tmp_path: Path) -> None:
    """`The | c at | sat | .` with cat -> K A T."""
    tokenizer = Pieces(["<eod>", " The", " c", "at", " sat", ".", " K", "A", "T", " Next"])
    table = word_table([[("en", [2, 3]), ("xx", [6, 7, 8])]], ("en", "xx"), vocab_size=11)
    table = replace(
        table,
        key_tokens=np.array([2, 3], dtype=np.int32),
        key_offsets=np.array([0, 2]),
        word_boundary=np.array([3, 5, 5, 4, 5, 3, 5, 4, 4, 5, 4], dtype=np.uint8),
    )
    documents = [np.array([1, 2, 3, 4, 5, 9, 0])]
    prefix = write_dataset(tmp_path / "en", documents, "en", vocab_size=11, fingerprint="sha256:0")
    source = DataSource(path=prefix, language="en")
    data = DataSection(tokenizer="pieces", sources=[source], seq_length=6, validation_fraction=0.0)
    section = CodeSwitchSection(ratio=1.0, lookahead=0)
    preview = make_preview(table, section, data, tokenizer, num_samples=3, seed=1)
    assert list(render_preview(preview, TextStyle(), labels=True)) == [
        "sample 1 (en): 1 of 3 words switched, 1 token truncated",
        "  original  The [cat] sat.",
        "  switched  The {KAT} sat.",
        "  position  0     1     2    3     4     5",
        "  input     ▁The  {▁K}  {A}  {T}   ▁sat  .",
        "  label     ▁c    –     –    ▁sat  .     ▁Next",
        "",
        "samples                       1  of 6 tokens, seed 1",
        "requested ratio                  1 of the known words, input_only",
        "running words                 3",
        "known                         1  33.33% of the running words",
        "switched                      1  33.33% of the running words, 100.00% of the known words",
        "into xx                       1  100.00% of the switched words",
        "tokens per switched word  +1.00  2.00 before, 3.00 after",
        "padded                        0  0.00% of the positions",
        "truncated tokens              1  16.67% of the positions; they no longer fit into their samples",
    ]
    coloured = list(render_preview(preview, TextStyle(color=True), labels=True))
    assert coloured[1] == "  original  The \x1b[1;32mcat\x1b[0m sat."
    assert coloured[2] == "  switched  The \x1b[1;32mKAT\x1b[0m sat."
    assert "\x1b[1;32m▁K\x1b[0m  \x1b[1;32mA\x1b[0m  \x1b[1;32mT\x1b[0m" in coloured[4]
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured]
    assert plain[3] == "  position  0     1   2  3     4     5"


def test_no_samples_are_refused(material: Material) -> None:
    with user_error("num_samples is 0", kind=ValueError):
        material.preview(num_samples=0)


def test_only_samples_of_the_source_language(material: Material) -> None:
    data = material.data()
    both = replace(data, sources=[*data.sources, *material.data("zh").sources])
    section = CodeSwitchSection(ratio=1.0)
    preview = make_preview(material.english, section, both, material.tokenizer, num_samples=16, seed=3)
    assert [sample.language for sample in preview.samples] == ["en"] * 16
    assert all(sample.switched for sample in preview.samples) and preview.skipped == {"zh": 30}
    assert any("skipped documents" in line and "zh" in line for line in render_preview(preview, TextStyle()))

"""Trains a tokenizer on multilingual text and reports its fertility per language."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_prealign.corpus.read_errors import OnError, Problems
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import write_atomically
from megatron_prealign.files.directories import check_writable, writing
from megatron_prealign.languages import check_language_code
from megatron_prealign.preprocess.fertility import Fertility, MeasuredText, measure_fertility
from megatron_prealign.preprocess.sampling import UNDETERMINED, Corpus, LanguageSampling, TextCount, plan_sampling
from megatron_prealign.preprocess.tokenizer_trainers import EOD, insert_word_breaks, train_byte_bpe, train_sentencepiece
from megatron_prealign.tokenizer.clone import CloneLanguage, save_clone
from megatron_prealign.tokenizer.load import load_tokenizer
from megatron_prealign.tokenizer.segmenters import Segmenter, open_segmenter, parse_segmenters

Kind = Literal["byte-bpe", "sentencepiece-unigram", "sentencepiece-bpe"]

LARGEST_VOCABULARY = 1 << 24
"""The trainers allocate memory for all ids and crash beyond it."""
# The special tokens and one token per byte, so that any text can be encoded.
MINIMUM_VOCABULARY: dict[Kind, int] = {
    "byte-bpe": 256 + 1,
    "sentencepiece-unigram": 256 + 3,
    "sentencepiece-bpe": 256 + 3,
}
DEFAULT_SAMPLE_BYTES: dict[Kind, int] = {
    "byte-bpe": 200_000_000,
    "sentencepiece-unigram": 100_000_000,
    "sentencepiece-bpe": 100_000_000,
}
REPORT_FILE = "fertility.json"
MODEL_FILE = "tokenizer.model"


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Settings of tokenizer training."""

    kind: Kind = "byte-bpe"
    temperature: float = 1.0
    """Balances the languages; see `sampling.plan_sampling`."""
    sample_bytes: int | None = None
    """Bytes of training text; None for `DEFAULT_SAMPLE_BYTES`. A smaller corpus is used completely.

    Determines the memory. Bytes per byte of text: byte-bpe at most 2 if words are separated by spaces or a segmenter,
    else up to 75; sentencepiece-bpe at most 25, sentencepiece-unigram at most 30.
    """
    held_out: float = 0.05
    """Fraction of the documents held out to measure fertility; at most 1 MB per language."""
    seed: int = 0
    """Seed for sampling documents."""
    segmenters: Sequence[str] = ()
    """`LANGUAGE=NAME` each: tokens do not cross word boundaries in this language; or `auto` for all that need one."""
    character_coverage: float = 0.9995
    """sentencepiece: fraction of character occurrences that get their own tokens."""

    def check(self) -> None:
        """Raises a UserError if a value is out of range."""
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature is {self.temperature}, expected a number above 0 (1 for no change)")
        if self.sample_bytes is not None and self.sample_bytes < 1:
            raise UserError(f"--sample-bytes is {self.sample_bytes}, expected at least 1")
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"--held-out is {self.held_out}, expected a fraction from 0 to 0.5")
        if not 0 < self.character_coverage <= 1:
            raise UserError(
                f"--character-coverage is {self.character_coverage}, expected a fraction above 0 and at most 1"
            )


@dataclass
class LanguageReport:
    """Training text and fertility of a language."""

    count: TextCount
    sampling: LanguageSampling
    segmenter: str | None
    sample: TextCount = field(default_factory=TextCount)
    """Training text; repeated documents count repeatedly."""
    fertility: Fertility | None = None


@dataclass
class TrainingReport:
    """Result of tokenizer training."""

    languages: dict[str, LanguageReport]
    problems: Problems
    """Skipped documents and files."""


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    clone_language: str | None = None,
    text_keys: Sequence[str] = ("text",),
    on_error: OnError = "stop",
    show_progress: bool = True,
    settings: TrainerSettings | None = None,
    clone_shared_ids: int = 0,
) -> TrainingReport:
    """Writes the directory `output`, which `load_tokenizer` opens; `<eod>` is token 0.

    It contains `tokenizer.json` and `tokenizer_config.json` (byte-level BPE, also readable by transformers) or
    `tokenizer.model` (sentencepiece), and `fertility.json`. The same inputs in the same order produce the same files,
    byte for byte. The inputs are read twice: to count and to sample.

    Args:
        inputs: files, directories, patterns and Hub names for `resolve_inputs`, each with an optional suffix
            `:LANGUAGE`.
        output: directory to create; it must not exist or be empty.
        vocab_size: total number of tokens, including `<eod>` and the 256 bytes.
        clone_language: makes it a clone tokenizer with 2 * vocab_size ids, the upper half for this language code.
        text_keys: keys of the text in each JSON object or row; several are joined by a line break.
        on_error: `stop` at the first bad document, or `skip` it.
        show_progress: whether to write progress to standard error.
        settings: further settings; None for the defaults.
        clone_shared_ids: number of ids, the first ones, that the clone language has in common with the original.

    Raises:
        UserError: invalid options, inputs or documents, or too little text for `vocab_size` tokens.
    """
    settings = settings or TrainerSettings()
    settings.check()
    least = MINIMUM_VOCABULARY[settings.kind]
    if not least <= vocab_size <= LARGEST_VOCABULARY:
        raise UserError(
            f"--vocab-size is {vocab_size}, expected at least {least} (256 bytes and the special tokens) and at most "
            f"{LARGEST_VOCABULARY:,}"
        )
    _check_clone(clone_language, clone_shared_ids, vocab_size)
    target = Path(output)
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target}: not a directory, expected the path of a new directory")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"--output {target}: directory is not empty; remove it or choose a new one")
    corpus = Corpus.open(inputs, text_keys, on_error)
    if settings.temperature != 1 and UNDETERMINED in corpus.languages:
        name = next(one.name for one, language in corpus.inputs if language == UNDETERMINED)
        raise UserError(
            f"--temperature is {settings.temperature}, but input {name} has no language; specify one, such as {name}:de"
        )
    names = parse_segmenters(settings.segmenters, corpus.languages)
    segmenters = {language: open_segmenter(name, language) for language, name in names.items()}
    # Fail before a large corpus is read for hours.
    check_writable(target.parent, f"--output {target}")
    counts = corpus.count(show_progress)
    budget = settings.sample_bytes or DEFAULT_SAMPLE_BYTES[settings.kind]
    sampling = plan_sampling(counts, settings.temperature, budget, settings.held_out)
    report = TrainingReport(
        {language: LanguageReport(counts[language], sampling[language], names.get(language)) for language in counts},
        corpus.problems,
    )
    measured = {language: MeasuredText(one.held_out) for language, one in sampling.items()}
    texts = _training_texts(corpus, report, measured, segmenters, settings.seed, show_progress)
    with writing(target, "tokenizer"), write_atomically(target) as directory:
        directory.mkdir()
        _train(texts, directory, vocab_size, settings)
        if clone_language is not None:
            save_clone(directory, CloneLanguage(clone_language, clone_shared_ids))
        tokenizer = load_tokenizer(directory)
        for language, language_report in report.languages.items():
            language_report.fertility = measure_fertility(
                tokenizer, language, measured[language], segmenters.get(language), names.get(language)
            )
        _write_report(directory / REPORT_FILE, corpus, vocab_size, settings, report)
    return report


def _check_clone(language: str | None, shared_ids: int, vocab_size: int) -> None:
    if language is not None:
        check_language_code(language, "--clone-language")
    if not 0 <= shared_ids < vocab_size or (shared_ids and language is None):
        raise UserError(
            f"--clone-shared-ids is {shared_ids}, expected a number from 0 to less than --vocab-size ({vocab_size}), "
            "and --clone-language"
        )


def _training_texts(
    corpus: Corpus,
    report: TrainingReport,
    measured: dict[str, MeasuredText],
    segmenters: dict[str, Segmenter],
    seed: int,
    show_progress: bool,
) -> Iterator[str]:
    """Yields the training texts; adds documents to measure on to `measured`."""
    sampling = {language: one.sampling for language, one in report.languages.items()}
    for document in corpus.sample(sampling, seed, show_progress):
        if document.measured:
            measured[document.language].add(document)
        if not document.copies:
            continue
        language_report = report.languages[document.language]
        language_report.sample.documents += document.copies
        language_report.sample.bytes += document.copies * len(document.text.encode("utf-8"))
        text = document.text
        if language_report.segmenter is not None:
            text = insert_word_breaks(text, segmenters[document.language], language_report.segmenter, document.where)
        for _ in range(document.copies):
            yield text


def _train(texts: Iterator[str], directory: Path, vocab_size: int, settings: TrainerSettings) -> None:
    if settings.kind == "byte-bpe":
        # The library's `save` reports a full disk as an untyped exception.
        definition = train_byte_bpe(texts, vocab_size).to_str(pretty=True)
        (directory / "tokenizer.json").write_text(definition, encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOD,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        model_type = settings.kind.removeprefix("sentencepiece-")
        model = train_sentencepiece(texts, vocab_size, model_type, settings.character_coverage)
        (directory / MODEL_FILE).write_bytes(model)


def _write_report(
    path: Path, corpus: Corpus, vocab_size: int, settings: TrainerSettings, report: TrainingReport
) -> None:
    languages: dict[str, Any] = {}
    for language, one in report.languages.items():
        assert one.fertility is not None, "fertility is measured before the report is written"
        languages[language] = {
            "documents": one.count.documents,
            "bytes": one.count.bytes,
            "share": one.sampling.fraction,
            "times": one.sampling.times,
            "sample_documents": one.sample.documents,
            "sample_bytes": one.sample.bytes,
            "segmenter": one.segmenter,
            "fertility": {
                **asdict(one.fertility),
                "tokens_per_word": one.fertility.tokens_per_word,
                "bytes_per_token": one.fertility.bytes_per_token,
                "fallback_share": one.fertility.fallback_share,
            },
        }
    values = {
        "settings": {"vocab_size": vocab_size, **asdict(settings)},
        "inputs": [{"name": one.name, "bytes": one.bytes, "language": language} for one, language in corpus.inputs],
        "skipped": report.problems.count,
        "languages": languages,
    }
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

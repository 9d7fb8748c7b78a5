"""Recipe section `data`: the tokenizer, the weighted training blend and the validation sets."""

from dataclasses import dataclass, field

from megatron_prealign import languages
from megatron_prealign.languages import is_language_code
from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One preprocessed dataset of the training blend."""

    path: str
    """Path prefix of the .bin/.idx/.json files, without extension."""
    language: str
    """Language code, as in the dictionary (en, de, ...)."""
    weight: float = 1.0
    """Fraction of training samples from this source, relative to the weights of the other sources."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data.sources[{self.path}].weight", self.weight, "a positive number")


@dataclass(frozen=True, kw_only=True)
class ValidationSource:
    """One preprocessed dataset held out for validation."""

    path: str
    """Path prefix of the .bin/.idx/.json files, without extension."""
    language: str
    """Language code."""


@dataclass(frozen=True, kw_only=True)
class ParallelText:
    """Two preprocessed datasets of translations: document i of one is the translation of document i of the other."""

    source: str
    """Path prefix of the dataset whose sentences query the other one."""
    target: str
    """Path prefix of the dataset of their translations, with the same number of documents."""
    languages: list[str] | None = None
    """Language codes of source and target; null takes them from the datasets."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Training and validation data."""

    tokenizer: str
    """Path of a Hugging Face tokenizer directory or a sentencepiece model file."""
    sources: list[DataSource]
    """Datasets of the training blend: a list of {path, language, weight}."""
    seq_length: int
    """Tokens per training sample."""
    validation: list[ValidationSource] = field(default_factory=list)
    """Separate validation datasets, a list of {path, language}; if empty, the last documents of each source are held
    out."""
    validation_fraction: float = 0.01
    """Fraction of each source's documents to hold out if validation is empty."""
    parallel_text: list[ParallelText] = field(default_factory=list)
    """Translated documents on which evaluations measure sentence retrieval, a list of {source, target, languages}."""
    eod_mask_loss: bool = False
    """Leave the token after each end-of-document token out of the loss."""
    reset_position_ids: bool = False
    """Restart position ids at 0 after each end-of-document token. Only affects learned positions (model.family gpt2):
    rotary positions depend only on distances, which do not change."""
    reset_attention_mask: bool = False
    """Prevent attention to earlier documents of the same sample. Attention then needs a seq_length x seq_length mask
    per sample and cannot use the flash kernel."""
    cache: str | None = None
    """Directory of the sample index cache; null means `cache` in logging.run_dir."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources", "empty", "at least one source")
        require(self.seq_length > 0, "data.seq_length", self.seq_length, "a positive number")
        require(
            0.0 <= self.validation_fraction < 1.0,
            "data.validation_fraction",
            self.validation_fraction,
            "a number in [0, 1)",
        )
        for name in ("sources", "validation"):
            for number, source in enumerate(getattr(self, name)):
                where = f"data.{name}[{number}].language"
                require(is_language_code(source.language), where, repr(source.language), languages.EXPECTED)
        paths = [source.path for source in self.sources]
        require(len(paths) == len(set(paths)), "data.sources", paths, "no duplicate paths")
        both = sorted(set(paths) & {source.path for source in self.validation})
        require(not both, "data.validation", both, "datasets that are not in data.sources, which are trained on")
        codes = [source.language for source in self.validation]
        require(len(codes) == len(set(codes)), "data.validation", codes, "no duplicate languages")
        for number, text in enumerate(self.parallel_text):
            self._check_parallel(text, f"data.parallel_text[{number}]")

    @staticmethod
    def _check_parallel(text: ParallelText, where: str) -> None:
        require(text.source != text.target, f"{where}.target", text.target, "another dataset than source")
        if text.languages is None:
            return
        codes = f"{where}.languages"
        for code in text.languages:
            require(is_language_code(code), codes, repr(code), languages.EXPECTED)
        require(
            len(set(text.languages)) == len(text.languages) == 2,
            codes,
            text.languages,
            "two different languages, of source and target, or null",
        )

    @property
    def languages(self) -> list[str]:
        """All languages of the blend and of the validation sets, in order of first mention."""
        sources: list[DataSource | ValidationSource] = [*self.sources, *self.validation]
        return list(dict.fromkeys(source.language for source in sources))

"""Recipe section `data`: the tokenizer, the weighted blend of languages and the validation sets."""

from dataclasses import dataclass, field

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One preprocessed dataset of the training blend."""

    path: str
    """Prefix of the .bin/.idx/.json files, without the ending."""
    language: str
    """Language code, as in the dictionary (en, de, ...)."""
    weight: float = 1.0
    """Share of the training samples, relative to the other sources."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data.sources[{self.path}].weight", self.weight, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class ValidationSource:
    """One preprocessed dataset held out for validation."""

    path: str
    """Prefix of the .bin/.idx/.json files, without the ending."""
    language: str
    """Language code."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Training and validation data."""

    tokenizer: str
    """Hugging Face tokenizer directory or sentencepiece model file."""
    sources: list[DataSource]
    """The training blend."""
    seq_length: int
    """Tokens per training sample."""
    validation: list[ValidationSource] = field(default_factory=list)
    """Separate validation datasets; when empty, the last documents of every source are held out."""
    validation_fraction: float = 0.01
    """Share of each source's documents held out when `validation` is empty."""
    eod_mask_loss: bool = False
    """Do not score the token that follows an end-of-document token."""
    reset_position_ids: bool = False
    """Count positions from 0 again after every end-of-document token. Only learned positions (model.family gpt2) read
    them; rotary ones depend on distances alone, which are the same either way."""
    reset_attention_mask: bool = False
    """Let no token attend to an earlier document of its sample. Attention then needs a mask of seq_length x seq_length
    per row and cannot use the flash kernel."""
    cache: str | None = None
    """Directory of the sample index cache; null means a directory inside logging.run_dir."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources", "empty", "at least one source")
        require(self.seq_length > 0, "data.seq_length", self.seq_length, "a number above 0")
        require(
            0.0 <= self.validation_fraction < 1.0,
            "data.validation_fraction",
            self.validation_fraction,
            "at least 0 and below 1",
        )
        paths = [source.path for source in self.sources]
        require(len(paths) == len(set(paths)), "data.sources", paths, "every path once")
        both = sorted(set(paths) & {source.path for source in self.validation})
        require(not both, "data.validation", both, "datasets that are not in data.sources: they would be trained on")
        languages = [source.language for source in self.validation]
        require(len(languages) == len(set(languages)), "data.validation", languages, "every language once")

    @property
    def languages(self) -> list[str]:
        """All languages of the blend and of the validation sets, in order of first mention."""
        sources: list[DataSource | ValidationSource] = [*self.sources, *self.validation]
        return list(dict.fromkeys(source.language for source in sources))

"""Recipe section `dictionary`: the table that alignment and code-switching share."""

from dataclasses import dataclass

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class DictionarySection:
    """The word table built by `megatron-prealign dictionary build`."""

    table: str
    """Path of the table.safetensors file."""
    held_out_fraction: float = 0.05
    """Share of the word groups never trained on by alignment or code-switching, kept to measure generalisation."""

    def __post_init__(self) -> None:
        require(
            0.0 <= self.held_out_fraction < 1.0,
            "dictionary.held_out_fraction",
            self.held_out_fraction,
            "at least 0 and below 1",
        )

"""Recipe section `dictionary`: the word table of alignment and code-switching."""

from dataclasses import dataclass

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class DictionarySection:
    """Word table built by `megatron-prealign dictionary build`."""

    table: str
    """Path of the table file (table.safetensors)."""
    held_out_fraction: float = 0.05
    """Fraction of word groups that alignment and code-switching never train on, to measure generalisation."""

    def __post_init__(self) -> None:
        require(
            0.0 <= self.held_out_fraction < 1.0,
            "dictionary.held_out_fraction",
            self.held_out_fraction,
            "a number in [0, 1)",
        )

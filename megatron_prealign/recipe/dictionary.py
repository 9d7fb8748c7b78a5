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
    evaluation_table: str | None = None
    """Path of the table whose pairs evaluations and the alignment watch measure; default `table`.

    A run with a shuffled table sets it to the true one.
    """

    def __post_init__(self) -> None:
        require(
            0.0 <= self.held_out_fraction < 1.0,
            "dictionary.held_out_fraction",
            self.held_out_fraction,
            "a number in [0, 1)",
        )

    @property
    def measured_table(self) -> str:
        """Path of the table whose pairs evaluations measure."""
        return self.evaluation_table or self.table

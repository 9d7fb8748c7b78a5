"""What code-switching works with: the table without held-out words, and how many running words it knows."""

import logging
from dataclasses import dataclass

from megatron_prealign.checkpoint.resume.identity import saved_coverage
from megatron_prealign.checkpoint.resume.start import FRESH, Start
from megatron_prealign.dictionary.coverage import blend_coverage
from megatron_prealign.dictionary.switchable import select_keys
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.recipe import CodeSwitchSection, Recipe
from megatron_prealign.run.inputs import Dictionary
from megatron_prealign.runtime.agreement import from_rank_zero, on_every_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Switching:
    """What code-switching replaces words with."""

    table: DictionaryTable
    """Without the held-out groups."""
    digest: str
    """Of `table`, for the checkpoints."""
    coverage: dict[str, float] | None
    """Share of running words of each language that code-switching knows; None where the ratio does not ask for it."""


def open_switching(recipe: Recipe, dictionary: Dictionary | None, start: Start = FRESH) -> Switching | None:
    """What the recipe's code-switching works with, None without it. Takes part: all ranks; one measures the data.

    Raises:
        UserError: the table or a dataset does not fit; raised on all ranks.
    """
    section = recipe.code_switch
    if section is None:
        return None
    assert dictionary is not None

    def read() -> tuple[DictionaryTable, str]:
        table = dictionary.table.without_groups(dictionary.held_out)
        return table, table.switching_digest()

    table, digest = on_every_rank("reading the dictionary", read)
    coverage = None
    if section.ratio_of == "words":
        coverage = from_rank_zero(
            "measuring the known words", lambda: words_known(recipe, section, table, digest, start)
        )
    return Switching(table, digest, coverage)


def words_known(
    recipe: Recipe, section: CodeSwitchSection, table: DictionaryTable, digest: str, start: Start
) -> dict[str, float]:
    """Share of running words of each language that code-switching knows: that of the checkpoint to go on from, so that
    no threshold moves, or else measured on the data."""
    coverage = None if start.summary is None else saved_coverage(start.summary, section, digest)
    source = "from the checkpoint"
    if coverage is None:
        coverage = blend_coverage(select_keys(table, section), recipe.data.sources)
        source = "measured"
    shares = ", ".join(f"{name} {share:.1%}" for name, share in coverage.items())
    logger.info("known running words, %s: %s", source, shares)
    return coverage

"""Whether a table can do what a recipe's `code_switch` section asks for. Imports no torch."""

from collections.abc import Sequence

import numpy as np

from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import CodeSwitchSection


def check_table(table: DictionaryTable, section: CodeSwitchSection, languages: Sequence[str]) -> None:
    """Checks the languages of the section and of the data against those of the table.

    Args:
        languages: the data's languages.

    Raises:
        UserError: the section names a language that the table lacks, or the table has no words of the data's.
    """
    where = f"the dictionary table{f' {table.path}' if table.path else ''}"
    for name in ("language_weights", "language_ratios"):
        unknown = [each for each in getattr(section, name) if each not in table.languages]
        if unknown:
            raise UserError(
                f"code_switch.{name} names {', '.join(unknown)}, expected languages of {where}: "
                f"{', '.join(table.languages)}; correct the recipe or build the table with these languages"
            )
    sources = [table.languages[index] for index in np.unique(table.key_language)]
    if sources and not set(sources) & set(languages):
        raise UserError(
            f"code_switch: {where} replaces words of {', '.join(sources)}, the data is in {', '.join(languages)}: "
            "nothing would ever be switched; add a source of that language or build the table the other way round"
        )

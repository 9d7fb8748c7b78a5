"""Header row of a list in columns: codes or English names of languages, and `weight`."""

from collections.abc import Sequence

from megatron_prealign.dictionary.formats.base import DictionaryInput
from megatron_prealign.dictionary.formats.language_codes import parse_language, same_language
from megatron_prealign.errors import UserError

WEIGHT = "weight"


def header_indices(row: Sequence[str], names: Sequence[str], languages: int) -> list[int] | None:
    """Column index of each name, the first `languages` of which are language codes; None if the row is not a header."""
    cells = [cell.strip().lower() for cell in row]
    wanted = [name.lower() for name in names]
    if set(cells) >= set(wanted):
        return [cells.index(name) for name in wanted]
    cell_codes = [parse_language(cell)[0] for cell in cells]
    indices = []
    for name in wanted[:languages]:
        codes = same_language(name)
        indices.append(next((index for index, other in enumerate(cell_codes) if codes & other), -1))
    indices += [cells.index(name) if name in cells else -1 for name in wanted[languages:]]
    return indices if -1 not in indices and len(set(indices)) == len(indices) else None


def check_languages(source: DictionaryInput, number: int, row: Sequence[str], *, only_names: bool = False) -> None:
    """Raises if the row is a header with languages other than the declared ones.

    Codes can also be words (`to,zu` in an English-German list), so at least one must be a language of the list.

    Args:
        number: number of the line.
        only_names: take English names of languages for a header, but not codes: where headers are rare, a row of codes
            is more likely one of words.

    Raises:
        UserError: see `other_languages`.
    """
    languages = source.languages
    cells = [cell.strip() for cell in row]
    if source.weights:
        cells = [cell for cell in cells if cell.lower() != WEIGHT]
    parsed = [parse_language(cell) for cell in cells]
    codes = [codes for codes, _ in parsed]
    if len(cells) < 2 or not all(codes) or len(set(codes)) < len(codes):
        return
    declared = frozenset().union(*map(same_language, languages))
    if all(is_name for _, is_name in parsed) or (not only_names and any(each & declared for each in codes)):
        raise other_languages(source, number, cells)


def other_languages(source: DictionaryInput, number: int, cells: Sequence[str]) -> UserError:
    """Returns the error for a header with other languages than the declared ones, or in another order."""
    codes = "-".join(source.languages)
    return UserError(
        f"{source.path}:{number}: got a header with columns {', '.join(cells)}, expected languages {codes}; declare "
        f"the languages of the columns, or write a header of {' and '.join(source.languages)} above this row if it "
        "contains words"
    )

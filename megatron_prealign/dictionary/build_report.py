"""What a build of a table counts: rules, skipped lines, warnings."""

from collections import Counter
from dataclasses import dataclass, field

from megatron_prealign.dictionary.groups import CLEANED, NOTES, READ
from megatron_prealign.dictionary.pivot import JOINED
from megatron_prealign.dictionary.readers import ReadErrors
from megatron_prealign.dictionary.table import MAX_KEY_TOKENS

UNKNOWN = "pairs with a word that the tokenizer cannot encode"
LONG_SOURCE = f"pairs with a source of more than {MAX_KEY_TOKENS} tokens"
LONG_TARGET = "pairs with a translation of too many tokens"
IDENTICAL = "pairs with identical tokens"
SURPLUS = "pairs beyond --max-translations"
KEPT = "pairs kept"
SPLIT_KEY = "case variants of several words or more than 8 tokens"
MARKED_KEY = "case variants covered by the key without the space, a separate token"
EMPTY_KEY = "case variants without a usable translation"
TAKEN_KEY = "case variants with the tokens of an earlier key"
KEYLESS = "groups without a key (used only by alignment)"
# Rules whose matches stay in the table.
_KEEPING = frozenset({READ, CLEANED, NOTES, JOINED, KEPT, KEYLESS})
# Rules that leave out a spelling of a word, not a pair.
_SPELLINGS = frozenset({SPLIT_KEY, MARKED_KEY, EMPTY_KEY, TAKEN_KEY})


@dataclass
class BuildReport:
    """Statistics of a build."""

    rules: Counter[str] = field(default_factory=Counter)
    """Number of pairs or variants that each rule matched, in the order in which the rules apply."""
    errors: ReadErrors = field(default_factory=ReadErrors)
    """Skipped lines."""
    encoder: str = ""
    """Encoder that tokenised the words."""
    warnings: list[str] = field(default_factory=list)
    """Warnings for the user."""

    @property
    def counted(self) -> dict[str, int]:
        """Counts of what was read and of what stays in the table, in the order in which the rules apply."""
        return {name: count for name, count in self.rules.items() if count and name in _KEEPING}

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> count of pairs that were left out, most first; lines that could not be read are one reason."""
        reasons = {"lines skipped": self.errors.count, **self.rules}
        return _most_first({name: reasons[name] for name in reasons if name not in _KEEPING | _SPELLINGS})

    @property
    def spellings_without_key(self) -> dict[str, int]:
        """Reason -> count of case variants of kept words that have no key of their own, most first."""
        return _most_first({name: count for name, count in self.rules.items() if name in _SPELLINGS})


def _most_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(((name, count) for name, count in counts.items() if count), key=lambda item: -item[1]))

"""English text for tests: sentences of a small lexicon, the same in every Python.

Words are drawn with frequencies that fall like those of real text, in sentences of several forms, among paragraphs,
lists, numbers and indented lines of code.
"""

import random


def _words(text: str) -> list[str]:
    return text.split()


# In falling frequency.
NOUNS = _words("""
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason research girl guy moment air
teacher force education foot boy age policy music market sense nation plan college interest death experience effect
use class control field development role effort rate heart drug show leader light voice wife police mind price report
decision son view relationship town road arm difference value building action season society tax director position
player record paper space ground form event official matter center couple site project activity star table court bread
river bridge garden kitchen window mountain bird horse letter village winter summer machine engine ship island
""")
VERBS = _words("""
has makes knows takes sees finds gives tells works calls tries asks needs feels becomes leaves puts means keeps lets
begins helps shows hears plays runs moves lives believes holds brings writes provides loses pays meets includes
continues sets learns changes leads understands watches follows stops creates speaks reads allows adds spends grows
opens walks wins offers remembers loves considers appears buys waits serves dies sends expects builds stays falls cuts
reaches kills remains suggests raises passes sells requires reports decides pulls
""")
ADJECTIVES = _words("""
new good high old great big small large national young different black long little important political bad white real
best social only public sure low early able human local late hard major better economic strong possible whole free
military true federal international full special easy clear recent certain personal open red difficult available
likely short single medical current wrong private past foreign fine common poor natural significant similar hot dead
central happy serious ready simple left physical general environmental financial blue democratic dark various entire
close legal religious cold final main green nice huge popular traditional cultural
""")
ADVERBS = _words("""
often never always again here there now then once already perhaps quickly slowly together almost
""")
JOINS = ("and", "but", "because", "when", "while", "so that", "although", "where")
OPENINGS = ("the", "a", "this", "every", "no", "their", "our", "one", "the", "some other")


class Writer:
    """Writes sentences from a seed; uses `Random.random` alone, whose sequence Python guarantees."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed).random

    def document(self) -> str:
        """A title and two to nine paragraphs, lists or pieces of code."""
        title = f"{self._one_of(ADJECTIVES)} {self._word(NOUNS)}".capitalize()
        parts = [f"{title}\n{'*' * len(title)}"]
        for _ in range(2 + self._below(8)):
            form = self._draw()
            parts.append(self._code() if form < 0.1 else self._list() if form < 0.25 else self._paragraph())
        return "\n\n".join(parts) + "\n"

    def _paragraph(self) -> str:
        return " ".join(self._sentence() for _ in range(2 + self._below(5)))

    def _list(self) -> str:
        return "\n".join(f"* {self._phrase()} ({self._below(2000)}%)" for _ in range(2 + self._below(4)))

    def _code(self) -> str:
        names = [self._word(NOUNS) for _ in range(2)]
        return f"   >>> {names[0]} = {self._below(100)}\n   >>> {names[1]}({names[0]}, *args)\n   {self._draw():.4f}"

    def _sentence(self) -> str:
        clauses = [self._clause()]
        while self._draw() < 0.35 and len(clauses) < 4:
            clauses += [self._one_of(JOINS), self._clause()]
        text = " ".join(clauses)
        return text[0].upper() + text[1:] + self._one_of(("...", "!", "?", *["."] * 9))

    def _clause(self) -> str:
        adverb = f"{self._one_of(ADVERBS)} " if self._draw() < 0.25 else ""
        place = f" {self._one_of(('of', 'in', 'with', 'for', 'to'))} {self._phrase()}" if self._draw() < 0.5 else ""
        return f"{self._phrase()} {adverb}{self._word(VERBS)} {self._phrase()}{place}"

    def _phrase(self) -> str:
        adjective = f"{self._word(ADJECTIVES)} " if self._draw() < 0.4 else ""
        return f"{self._one_of(OPENINGS)} {adjective}{self._word(NOUNS)}"

    def _word(self, words: list[str]) -> str:
        """The cube of a uniform number makes the first words of a list frequent and the last ones rare."""
        return words[int(self._draw() ** 3 * len(words))]

    def _one_of(self, choices: list[str] | tuple[str, ...]) -> str:
        return choices[self._below(len(choices))]

    def _below(self, end: int) -> int:
        return int(self._draw() * end)


def english_texts(count: int, seed: int = 1) -> list[str]:
    """`count` documents of about 1 kB."""
    writer = Writer(seed)
    return [writer.document() for _ in range(count)]

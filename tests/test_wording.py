"""The field's words: strings, docstrings and comments of the package, and its documents, avoid private idiom.

A word is on the list because reviewers did not understand it or because it stood for a standard term.
"""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Words to avoid -> what to write. Patterns ignore case and match whole words.
WORDS = {
    r"mistakes?": "error",
    r"told|tells": "reported, logged, shows",
    r"go(es|ing)? on (from|with|in|where|after)|begins? anew|anew": "resume, continue; start from scratch",
    r"mend(s|ed|ing)?": "fix, repair",
    r"beside": "next to; extra, auxiliary",
    r"shared out": "sharded, partitioned",
    r"number formats?": "dtype",
    r"folders?": "directory",
    r"theirs|ours": "hf, mcore; Hugging Face's, Megatron-Core's",
    r"house|rooms?": "package, layer",
    r"(a|of|in|the) strips?": "chunk, tile",
    r"channels of (a|the|each) head": "head dimension",
    r"held (parameters?|blocks?|weights?)|hold (parameters?|blocks?|weights?)": "frozen, freeze",
    r"broken? down|broke down": "diverged",
    r"so many": "N, the number of",
    r"comes? again": "repeats",
    r"of one's own|somebody else('s)?|nobody": "custom; another; no one is the subject",
    r"(is|are) there and": "exists and",
    r"takes? part: ": "Collective: call on all ranks.",
}
PATTERNS = {re.compile(rf"\b({words})\b", re.IGNORECASE): instead for words, instead in WORDS.items()}


def python_text(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of every string and comment."""
    reader = io.StringIO(path.read_text(encoding="utf-8")).readline
    for token in tokenize.generate_tokens(reader):
        if token.type in (tokenize.STRING, tokenize.COMMENT) or "FSTRING_MIDDLE" in tokenize.tok_name[token.type]:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def texts() -> list[Path]:
    code = [path for name in ("megatron_prealign", "kernels", "tools", "examples") for path in (ROOT / name).rglob("*")]
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / "setup.py"]
    return sorted(
        path for path in [*code, *documents] if path.suffix in {".py", ".md", ".sh", ".yaml", ""} and path.is_file()
    )


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_words_of_the_field(path: Path) -> None:
    lines = (
        python_text(path) if path.suffix == ".py" else enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    )
    found = [
        f"line {number}: {match[0]!r} (write: {instead}): {line.strip()}"
        for number, line in lines
        for pattern, instead in PATTERNS.items()
        if (match := pattern.search(line))
    ]
    assert not found, "\n".join(found)

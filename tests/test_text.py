"""Quantities and names in text."""

import pytest

from megatron_prealign.text import shorten


@pytest.mark.parametrize(
    ("text", "length", "shortened"),
    [("abcdef", 6, "abcdef"), ("abcdefg", 6, "abc…fg"), ("abcdefg", 5, "ab…fg"), ("", 3, ""), ("ab", 1, "…")],
)
def test_a_name_is_shortened_in_its_middle(text: str, length: int, shortened: str) -> None:
    assert shorten(text, length) == shortened
    assert len(shortened) <= length

"""Text for people: counts, durations, commands, progress lines."""

import io
import shlex
import sys

import pytest

from megatron_prealign.progress import Progress
from megatron_prealign.text import align_left, clock, closing, command, duration, number_hint, plural, shorten


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (0, "key", "0 keys"),
        (3, "entry", "3 entries"),
        (1200, "batch", "1,200 batches"),
    ],
)
def test_plural(count: int, noun: str, text: str) -> None:
    assert plural(count, noun) == text


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.123, 2.4, 90.0, 7200.0)] == ["0.12 s", "2 s", "1.5 min", "2.0 h"]
    assert [clock(seconds) for seconds in (0.4, 59.6, 3723, 360000)] == ["0:00:00", "0:01:00", "1:02:03", "100:00:00"]


@pytest.mark.parametrize(
    ("text", "kind", "readings"),
    [
        ("2,0e-3", float, ["2.0e-3"]),
        ("-0,5", float, ["-0.5"]),
        (",5", float, [".5"]),
        ("1,000", float, ["1000", "1.000"]),
        ("1,000,000", float, ["1000000"]),
        ("1,000", int, ["1000"]),
        ("12,345,678", int, ["12345678"]),
        ("1,5", int, []),
        ("1e-3,", float, []),
        ("much", float, []),
    ],
)
def test_numbers_with_a_comma(text: str, kind: type, readings: list[str]) -> None:
    assert number_hint(text, kind) == (f"; write {' or '.join(readings)}" if readings else "")
    assert all(isinstance(kind(each), kind) for each in readings)


def test_commands_are_quoted() -> None:
    words = ["convert", "to-hf", "--checkpoint", "a b", "it's", "$HOME", "*"]
    assert shlex.split(command(*words)) == ["megatron-prealign", *words]
    assert closing("wrote x", command("a"), command("b")).splitlines() == [
        "wrote x",
        "next: megatron-prealign a",
        "next: megatron-prealign b",
    ]


def test_labels_are_aligned() -> None:
    assert align_left([("a", "x"), ("long", "y z")]) == ["a     x", "long  y z"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
@pytest.mark.parametrize(
    ("total", "unit", "text"),
    [
        (2_300_000, "B", "1.15MB/2.30MB"),
        (None, "B", "1.15MB ["),
        (None, "documents", "1150000 documents ["),
        (2_300_000, "documents", "1150000/2300000 documents ["),
    ],
)
def test_amounts_have_their_unit(
    monkeypatch: pytest.MonkeyPatch, stream_type: type[io.StringIO], total: int | None, unit: str, text: str
) -> None:
    stream = stream_type()
    monkeypatch.setattr(sys, "stderr", stream)
    # Wide enough for a bar.
    with Progress("work", total, unit=unit, unit_scale=unit == "B") as progress:
        progress._bar.dynamic_ncols = None
        progress._bar.ncols = 200
        progress.update(1_150_000)
        progress._bar.refresh()
    assert text in stream.getvalue()
    assert "documents/s" in stream.getvalue() or "B/s" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "length", "shortened"),
    [("abcdef", 6, "abcdef"), ("abcdefg", 6, "abc…fg"), ("abcdefg", 5, "ab…fg"), ("", 3, ""), ("ab", 1, "…")],
)
def test_a_name_is_shortened_in_its_middle(text: str, length: int, shortened: str) -> None:
    assert shorten(text, length) == shortened
    assert len(shortened) <= length

"""A preview on a terminal and as a page: the content of documents is always rendered as plain text."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prealign.code_switch.preview import Part, Preview, PreviewSample
from megatron_prealign.code_switch.preview_page import render_page
from megatron_prealign.code_switch.preview_text import (
    TextStyle,
    display_width,
    render_preview,
    split_space,
    visible,
    wrap,
)
from megatron_prealign.code_switch.token_text import INCOMPLETE, TokenText
from megatron_prealign.recipe import CodeSwitchSection
from megatron_prealign.tokenizer.load import load_tokenizer


def kept(text: str) -> Part:
    return Part(text, text, None, 1, 1)


def preview_of(*parts: Part, **section: Any) -> Preview:
    counts = (len(parts), len(parts), sum(part.language is not None for part in parts), 0, 2)
    sample = PreviewSample("en", parts, (1,) * len(parts), (1,) * len(parts), (None,) * len(parts), counts)
    return Preview(
        samples=(sample,),
        section=CodeSwitchSection(**{"ratio": 0.1, **section}),
        ratios={"de": 0.1, "ar": 0.2},
        seq_length=10,
        seed=3,
        text=SimpleNamespace(text=lambda tokens: "x"),
    )


DOCUMENT = 'a <script>alert("1")</script> & b\n\x1b[31mred\x07'
PREVIEW = preview_of(
    kept(DOCUMENT),
    Part(" apple", ' A"pf<b>el', "de", 1, 3),
    kept(","),
    Part(" house", " بيت", "ar", 1, 2),
    kept(" end"),
)


def test_lines_without_colours() -> None:
    assert list(render_preview(PREVIEW, TextStyle()))[:3] == [
        "sample 1 (en): 2 of 5 words switched, 2 tokens truncated",
        '  original  a <script>alert("1")</script> & b⏎ ␛[31mred␇ [apple], [house] end',
        '  switched  a <script>alert("1")</script> & b⏎ ␛[31mred␇ {A"pf<b>el}, {بيت} end',
    ]


def test_token_lengths_exclude_translations_that_may_be_truncated() -> None:
    parts = (Part(" apple", " Apfel", "de", 1, 3), Part(" house", " Haus", "de", 2, 1))
    padded = preview_of(*parts)
    assert len(padded.samples[0].tokens) == 2 and padded.token_lengths == (1.5, 2.0)
    full = replace(padded, samples=(replace(padded.samples[0], tokens=(1, 1, 1, 1)),))
    assert full.token_lengths == (1.0, 3.0)


def test_colours_differ_by_language() -> None:
    caption, original, result = list(render_preview(PREVIEW, TextStyle(color=True)))[:3]
    assert caption.startswith("\x1b[2msample 1 (en)") and caption.endswith("\x1b[0m")
    assert original.endswith(" \x1b[1;32mapple\x1b[0m, \x1b[1;36mhouse\x1b[0m end")
    assert result.endswith(' \x1b[1;32mA"pf<b>el\x1b[0m, \x1b[1;36mبيت\x1b[0m end')
    assert "\x1b[31m" not in original


def test_layout_follows_the_width() -> None:
    narrow = list(render_preview(PREVIEW, TextStyle(width=41)))
    assert narrow[1] == '  original  a <script>alert("1")</script>'
    assert narrow[2:4] == ["            & b⏎ ␛[31mred␇ [apple],", "            [house] end"]
    # a terminal that reorders right-to-left words would mix up columns
    assert list(render_preview(PREVIEW, TextStyle(width=150)))[1].startswith("  original  a <script>")
    german = preview_of(kept("The"), Part(" apple", " Apfel", "de", 1, 1), kept(" 苹果 is red"))
    lines = list(render_preview(german, TextStyle(width=140)))
    assert lines[1] == "  original" + " " * 59 + " │ switched"
    assert lines[2] == "  The [apple] 苹果 is red" + " " * 44 + " │ The {Apfel} 苹果 is red"


@pytest.mark.parametrize("width", [5, 9, 30])
def test_wrap(width: int) -> None:
    text = "The 苹果和银行的 house, e\u0301tude  extraordinarily\u3000long"
    lines = wrap([(text[:6], ""), (text[6:], "1")], width)
    joined = ["".join(part for part, _ in line) for line in lines]
    assert all(display_width(line) <= width for line in joined)
    assert "".join(joined).replace(" ", "") == "".join(text.split())
    assert all(line == line.strip() and line for line in joined)
    assert [code for line in lines for part, code in line if "和" in part] == ["1"]
    if width == 9:
        assert joined[:3] == ["The 苹果", "和银行的", "house,"]


def test_widths() -> None:
    assert [display_width(text) for text in ("a", "苹", "e\u0301", "ｶ", "")] == [1, 2, 1, 1, 0]
    assert visible("a\tb\nc\x00\x9b") == "a b⏎ c␀␡"


def test_spaces_stay_outside_the_marks() -> None:
    assert split_space("  word") == ("  ", "word")
    assert split_space("word") == ("", "word")
    assert split_space("⟦ word⟧") == (" ", "⟦word⟧")
    # the sample ends after the space of a translation
    assert split_space(" ") == (" ", "…")


class Page(HTMLParser):
    """Collects elements with their attributes and checks that they are nested correctly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page() -> None:
    text = render_page(PREVIEW)
    page = Page(text)
    assert page.open == []
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "b", "link", "img", "iframe"} & set(tags)
    assert not any(name in ("src", "href") or name.startswith("on") for _, each in page.elements for name in each)
    assert "http://" not in text and "https://" not in text and "url(" not in text
    marks = [attributes for tag, attributes in page.elements if tag == "mark"]
    assert [mark["title"] for mark in marks] == ['apple → A"pf<b>el (de)', "house → بيت (ar)"] * 2
    assert len({mark["style"] for mark in marks}) == 2 and tags.count("bdi") == 4 and tags.count("sub") == 2
    # line breaks are kept, control characters are replaced
    assert 'a <script>alert("1")</script> & b\n␛[31mred␇ apple, house end' in page.text
    assert 'red␇ A"pf<b>elde, بيتar end' in page.text
    assert "prefers-color-scheme: dark" in text
    for name in ("requested ratio", "running words", "into de", "into ar", "tokens per switched word", "padded"):
        assert name in page.text
    assert "de 0.1, ar 0.2 of the known words, input_only" in page.text


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TokenText:
    """A tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({each: index for index, each in enumerate(["<eod>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return TokenText(load_tokenizer(directory))


def test_characters_split_over_spans(byte_level: TokenText) -> None:
    tokens = byte_level._tokenizer.encode("a果 b银c")
    # a, three bytes, space, b, three bytes, c
    assert byte_level.pieces([tokens[:2], tokens[2:5], tokens[5:8], tokens[8:]]) == ["a", "果 ", "b", "银c"]
    assert byte_level.pieces([tokens[:2], tokens[2:3], tokens[3:4], tokens[4:]]) == ["a", "", "果", " b银c"]
    # incomplete at both ends of the sequence
    assert byte_level.pieces([tokens[2:4], tokens[4:6], tokens[6:7]]) == ["", " b", ""]
    # invalid bytes within the sequence stay visible
    assert byte_level.pieces([tokens[:2], tokens[4:6]]) == ["a", f"{INCOMPLETE} b"]
    assert byte_level.text(tokens[4:6]) == " b" and byte_level.pieces([]) == []


def test_spaces_of_tokenizers_that_strip_the_first(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the apple and the house"] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    text = TokenText(loaded)
    words = [loaded.encode_word(word) for word in ("the", "apple", "house")]
    assert loaded.decode(words[1]) == "apple"
    assert text.pieces(words) == [" the", " apple", " house"]

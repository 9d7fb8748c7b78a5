"""English-Clone for transformers: a `tokenizer.json` with every ordinary id again, shifted by the vocabulary's size.

The tokenizer encodes as its base does, since which language a text is in is known to the data alone; ids of the clone
come out of the model. Each has a name of its own, its base's text between the brackets of `data.clone`, and a run of
them decodes to one text between brackets.
"""

import json
from typing import Any

from megatron_prealign.conversion.sentencepiece_definition import Definition
from megatron_prealign.tokenizer.clone import CLONE_CLOSE, CLONE_OPEN
from megatron_prealign.tokenizer.huggingface import piece_content
from megatron_prealign.tokenizer.word_boundaries import byte_level_alphabet

# Part of the names in a unigram vocabulary, which would otherwise be found in texts: the model never sees a space, and
# Unicode reserves the other one for use inside a program.
_HIDDEN = " \ufdd0"


def clone_definition(definition: Definition, vocab_size: int) -> Definition:
    """The same tokenizer with twice the ids.

    Args:
        definition: The base tokenizer's.
        vocab_size: Ids of the base; id + vocab_size is the clone's.
    """
    unigram = definition["model"]["type"] == "Unigram"
    own = {number: token for token, number in _vocabulary(definition["model"]).items()}
    # The library gives added tokens that the model lacks new ids behind the model's: behind the clone's, then.
    own |= {token["id"]: token["content"] for token in definition["added_tokens"]}
    hidden = _HIDDEN if unigram else ""
    byte_level = any('"ByteLevel"' in json.dumps(definition[part]) for part in ("pre_tokenizer", "decoder"))
    texts = {number: _text(token, byte_level) for number, token in own.items()}
    names = _names(own, texts, vocab_size, hidden)
    steps = [
        *([definition["decoder"]] if definition["decoder"] else []),
        {"type": "Fuse"},
        _replace(CLONE_OPEN + hidden, CLONE_OPEN),
        _replace(CLONE_CLOSE + CLONE_OPEN, ""),
    ]
    model = {**definition["model"], "vocab": _doubled(definition["model"], own, names, vocab_size)}
    return {**definition, "model": model, "decoder": {"type": "Sequence", "decoders": steps}}


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: number for number, (token, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _replace(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def _names(own: dict[int, str], texts: dict[int, str], vocab_size: int, hidden: str) -> list[str]:
    """A name for the clone of each id, different from all others."""
    taken, names = set(own.values()), [""] * vocab_size
    # The letter before the byte that stands for the same letter.
    for number in sorted(range(vocab_size), key=lambda number: isinstance(piece_content(own.get(number, "")), bytes)):
        token = own.get(number, f"unused {number}")
        for text in (texts.get(number, token), token, f"{token} {number}"):
            name = f"{CLONE_OPEN}{hidden}{text}{CLONE_CLOSE}"
            if name not in taken:
                break
        taken.add(name)
        names[number] = name
    return names


def _text(token: str, byte_level: bool) -> str:
    """What a token stands for, if that is text; otherwise the token."""
    if byte_level:
        alphabet = byte_level_alphabet()
        try:
            return bytes(alphabet[character] for character in token).decode()
        except (KeyError, UnicodeDecodeError):
            return token
    content = piece_content(token)
    if isinstance(content, str):
        return content
    # One byte of a character says nothing by itself.
    return content.decode() if content.isascii() else token


def _doubled(model: dict[str, Any], own: dict[int, str], names: list[str], vocab_size: int) -> Any:
    if model["type"] != "Unigram":
        return {token: number for number, token in own.items()} | {
            name: vocab_size + number for number, name in enumerate(names)
        }
    # Below the lowest score of the others it would move the score of unknown characters.
    lowest = min(score for _, score in model["vocab"])
    rest = range(len(model["vocab"]), vocab_size)
    return [
        *model["vocab"],
        *([own.get(number, f"{_HIDDEN}unused {number}"), lowest] for number in rest),
        *([name, lowest] for name in names),
    ]

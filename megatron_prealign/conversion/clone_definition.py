"""English-Clone for transformers: a `tokenizer.json` with a clone of every ordinary id, offset by the vocabulary size.

The tokenizer encodes like its base, because only the data determines the language of a text; cloned ids are produced by
the model. Each has a unique name, the text of its base token between the brackets of `tokenizer.clone`, and a run of
cloned ids decodes to one text between brackets.
"""

import json
from typing import Any

from megatron_prealign.conversion.sentencepiece_definition import Definition
from megatron_prealign.tokenizer.clone import CLONE_CLOSE, CLONE_OPEN
from megatron_prealign.tokenizer.huggingface import piece_content
from megatron_prealign.tokenizer.word_boundaries import byte_level_alphabet

# Part of the clones' names in a unigram vocabulary, which would otherwise match in texts: the model never sees a space,
# and the other character is a Unicode noncharacter, reserved for internal use.
_UNMATCHABLE = " \ufdd0"


def clone_definition(definition: Definition, vocab_size: int) -> Definition:
    """The definition of the same tokenizer with twice the ids.

    Args:
        definition: Definition of the base tokenizer.
        vocab_size: Number of ids of the base tokenizer; id + vocab_size is the cloned id.
    """
    unigram = definition["model"]["type"] == "Unigram"
    base = {number: token for token, number in _vocabulary(definition["model"]).items()}
    # The library appends added tokens that the model lacks: without this, after the cloned ids.
    base |= {token["id"]: token["content"] for token in definition["added_tokens"]}
    marker = _UNMATCHABLE if unigram else ""
    byte_level = any('"ByteLevel"' in json.dumps(definition[part]) for part in ("pre_tokenizer", "decoder"))
    texts = {number: _text(token, byte_level) for number, token in base.items()}
    names = _names(base, texts, vocab_size, marker)
    steps = [
        *([definition["decoder"]] if definition["decoder"] else []),
        {"type": "Fuse"},
        _replace(CLONE_OPEN + marker, CLONE_OPEN),
        _replace(CLONE_CLOSE + CLONE_OPEN, ""),
    ]
    model = {**definition["model"], "vocab": _doubled(definition["model"], base, names, vocab_size)}
    return {**definition, "model": model, "decoder": {"type": "Sequence", "decoders": steps}}


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: number for number, (token, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _replace(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def _names(base: dict[int, str], texts: dict[int, str], vocab_size: int, marker: str) -> list[str]:
    """Unique names of the clones of all ids."""
    taken, names = set(base.values()), [""] * vocab_size
    # Byte tokens last: a character takes precedence over the byte token of the same character.
    for number in sorted(range(vocab_size), key=lambda number: isinstance(piece_content(base.get(number, "")), bytes)):
        token = base.get(number, f"unused {number}")
        for text in (texts.get(number, token), token, f"{token} {number}"):
            name = f"{CLONE_OPEN}{marker}{text}{CLONE_CLOSE}"
            if name not in taken:
                break
        taken.add(name)
        names[number] = name
    return names


def _text(token: str, byte_level: bool) -> str:
    """The text of a token, or its name if it is not text."""
    if byte_level:
        alphabet = byte_level_alphabet()
        try:
            return bytes(alphabet[character] for character in token).decode()
        except (KeyError, UnicodeDecodeError):
            return token
    content = piece_content(token)
    if isinstance(content, str):
        return content
    # One byte of a multi-byte character is not text.
    return content.decode() if content.isascii() else token


def _doubled(model: dict[str, Any], base: dict[int, str], names: list[str], vocab_size: int) -> Any:
    if model["type"] != "Unigram":
        return {token: number for number, token in base.items()} | {
            name: vocab_size + number for number, name in enumerate(names)
        }
    # A score below the lowest one would change the score of unknown characters.
    lowest = min(score for _, score in model["vocab"])
    rest = range(len(model["vocab"]), vocab_size)
    return [
        *model["vocab"],
        *([base.get(number, f"{_UNMATCHABLE}unused {number}"), lowest] for number in rest),
        *([name, lowest] for name in names),
    ]

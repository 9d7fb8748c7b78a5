"""Converts a sentencepiece model to a `tokenizer.json` that gives the same ids with the library `tokenizers`, which
transformers uses.

It compensates for differences between the two libraries: sentencepiece treats a whole text as one word, never matches
the names of control and byte pieces in a text, and adds its space before every text, even one that starts with a space.
Models that cannot be converted are refused.
"""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.huggingface import METASPACE

# Types of pieces and of models in sentencepiece's file format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")

Definition = dict[str, Any]
"""Content of a `tokenizer.json`."""


def sentencepiece_definition(path: Path) -> Definition:
    """The `tokenizer.json` of a sentencepiece model file. Ids are the positions of its pieces.

    Raises:
        UserError: the model uses a feature that `tokenizers` does not support.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    _check_supported(model, path)
    unigram = model.trainer_spec.model_type == _UNIGRAM
    special = [
        _added_token(number, piece.piece, special=True)
        for number, piece in enumerate(model.pieces)
        if piece.type in (_CONTROL, _UNKNOWN)
    ]
    user_defined = [
        _added_token(number, piece.piece, special=False)
        for number, piece in enumerate(model.pieces)
        if piece.type == _USER_DEFINED and not unigram
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted([*special, *user_defined], key=lambda token: token["id"]),
        "normalizer": _normalizer(model.normalizer_spec),
        "pre_tokenizer": _name_splitter(model) if unigram else None,
        "post_processor": None,
        "decoder": _decoder(model.normalizer_spec.add_dummy_prefix),
        "model": _unigram(model) if unigram else _bpe(model),
    }


def _check_supported(model: Any, path: Path) -> None:
    kind, types = model.trainer_spec.model_type, [piece.type for piece in model.pieces]
    problem = ""
    if kind not in (_UNIGRAM, _BPE):
        problem = "model type word or char, expected unigram or bpe"
    elif kind == _BPE and _UNUSED in types:
        problem = f"{types.count(_UNUSED)} unused pieces, which BPE in transformers does not support"
    elif kind == _BPE and _USER_DEFINED in types:
        spec = model.normalizer_spec
        if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
            problem = (
                "user-defined symbols together with white space normalisation, which transformers would apply around "
                "each symbol"
            )
    elif len({piece.piece for piece in model.pieces}) < len(types):
        problem = "two pieces have the same text"
    if problem:
        raise UserError(
            f"cannot convert {path} to a tokenizer.json with the same ids: {problem}; use --tokenizer copy, which "
            "copies the file unchanged"
        )


def _added_token(number: int, content: str, *, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **plain, "special": special}


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        encoded = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if spec.remove_extra_whitespaces:
        # sentencepiece also removes its own space symbol at the end of a text.
        steps.append(_replace_matches(rf"\A +|[ {METASPACE}]+\z", ""))
        steps.append(_replace_matches(" {2,}", " "))
    if spec.add_dummy_prefix:
        # Unlike the pre-tokenizer "Metaspace", this also prepends before a space.
        steps.append({"type": "Prepend", "prepend": METASPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": METASPACE})
    return {"type": "Sequence", "normalizers": steps}


def _replace_matches(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _decoder(prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": METASPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(model: Any) -> dict[str, Any]:
    normal = [piece.score for piece in model.pieces if piece.type == _NORMAL]
    lowest, highest = min(normal), max(normal)
    vocabulary: list[tuple[str, float]] = []
    for number, piece in enumerate(model.pieces):
        if piece.type == _USER_DEFINED:
            # sentencepiece's rule. A score below the lowest one would change the score of unknown characters.
            score = max(len(piece.piece.encode()) * highest - 0.1, lowest)
            vocabulary.append((piece.piece, score))
        elif piece.type == _UNUSED:
            # The normaliser leaves no spaces, so this name never matches.
            vocabulary.append((f"unused {number} {piece.piece}", lowest))
        else:
            vocabulary.append((piece.piece, piece.score))
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == _UNKNOWN)
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": vocabulary,
        "byte_fallback": bool(model.trainer_spec.byte_fallback),
    }


def _name_splitter(model: Any) -> dict[str, Any] | None:
    """Pre-tokenizer that keeps the names of control and byte pieces from matching in a text: it splits the text inside
    them, between two characters that are adjacent in no piece."""
    normal = [piece.piece for piece in model.pieces if piece.type in (_NORMAL, _USER_DEFINED)]
    pairs = {piece[at : at + 2] for piece in normal for at in range(len(piece) - 1)}
    names = [piece.piece for piece in model.pieces if piece.type in (_CONTROL, _UNKNOWN, _BYTE)]
    tails: dict[str, list[str]] = {}
    for name in names:
        cut = next((at for at in range(1, len(name)) if name[at - 1 : at + 1] not in pairs), None)
        if cut is not None:
            tails.setdefault(name[:cut], []).append(name[cut:])
    if not tails:
        return None
    parts = [f"(?<={_escaped(head)})(?:{_alternatives(rest)})" for head, rest in sorted(tails.items())]
    pattern = {"Regex": "|".join(parts)}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithNext", "invert": False}


def _alternatives(texts: Sequence[str]) -> str:
    if len(texts) == 256 and all(_BYTE_NAME.fullmatch(f"<{text}") for text in texts):
        return "0x[0-9A-F]{2}>"
    return "|".join(_escaped(text) for text in texts)


def _escaped(text: str) -> str:
    return "".join(rf"\x{{{ord(character):x}}}" for character in text)


def _bpe(model: Any) -> dict[str, Any]:
    """Converts BPE scores to BPE merges: every pair that forms a piece, pieces with higher scores first."""
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    usable = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    ordered = sorted(
        (piece for piece in model.pieces if piece.type == _NORMAL), key=lambda piece: piece.score, reverse=True
    )
    merges = [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in ordered
        # The longest left part first: sentencepiece's choice among overlapping pairs.
        for cut in range(len(piece.piece) - 1, 0, -1)
        if piece.piece[:cut] in usable and piece.piece[cut:] in usable
    ]
    unknown = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(model.trainer_spec.byte_fallback),
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }

"""A sentencepiece model as a `tokenizer.json`: the same ids from the library `tokenizers`, which transformers uses.

Where the two libraries differ by design this file takes care of it: sentencepiece looks at a whole text as one word,
never finds control and byte pieces in a text by their names, and puts its space in front of every text, also of one
that starts with a space. What cannot be carried over is refused.
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
"""The content of a `tokenizer.json`."""


def sentencepiece_definition(path: Path) -> Definition:
    """The `tokenizer.json` of a sentencepiece model file. Ids are the positions of its pieces.

    Raises:
        UserError: it has something that `tokenizers` has no counterpart for.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    _refuse_what_is_unknown(model, path)
    unigram = model.trainer_spec.model_type == _UNIGRAM
    special = [
        _added_token(number, piece.piece, special=True)
        for number, piece in enumerate(model.pieces)
        if piece.type in (_CONTROL, _UNKNOWN)
    ]
    frozen = [
        _added_token(number, piece.piece, special=False)
        for number, piece in enumerate(model.pieces)
        if piece.type == _USER_DEFINED and not unigram
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted([*special, *frozen], key=lambda token: token["id"]),
        "normalizer": _normalizer(model.normalizer_spec),
        "pre_tokenizer": _cuts(model) if unigram else None,
        "post_processor": None,
        "decoder": _decoder(model.normalizer_spec.add_dummy_prefix),
        "model": _unigram(model) if unigram else _bpe(model),
    }


def _refuse_what_is_unknown(model: Any, path: Path) -> None:
    kind, types = model.trainer_spec.model_type, [piece.type for piece in model.pieces]
    problem = ""
    if kind not in (_UNIGRAM, _BPE):
        problem = "it is of type word or char, expected unigram or bpe"
    elif kind == _BPE and _UNUSED in types:
        problem = f"{types.count(_UNUSED)} of its pieces are marked as unused, which BPE in transformers does not know"
    elif kind == _BPE and _USER_DEFINED in types:
        spec = model.normalizer_spec
        if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
            problem = (
                "it has user-defined symbols and changes the white space of a text, which transformers would then do "
                "around each symbol"
            )
    elif len({piece.piece for piece in model.pieces}) < len(types):
        problem = "two of its pieces have the same text"
    if problem:
        raise UserError(
            f"{path}: this sentencepiece model cannot be given to transformers with the same ids ({problem}); use "
            "--tokenizer copy, which puts the file beside the model as it is"
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
        # sentencepiece removes its own sign for a space at the end of a text, too.
        steps.append(_replace_matches(rf"\A +|[ {METASPACE}]+\z", ""))
        steps.append(_replace_matches(" {2,}", " "))
    if spec.add_dummy_prefix:
        # Unlike the pre-tokenizer "Metaspace" it does so in front of a space, too.
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
            # sentencepiece's own rule. Below the lowest score it would move the score of unknown characters.
            score = max(len(piece.piece.encode()) * highest - 0.1, lowest)
            vocabulary.append((piece.piece, score))
        elif piece.type == _UNUSED:
            # No text has a space when the model sees it, so that this is never found.
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


def _cuts(model: Any) -> dict[str, Any] | None:
    """Keeps the names of control and byte pieces from being found in a text as pieces: the text is cut inside them, at
    a place that no piece goes across."""
    normal = [piece.piece for piece in model.pieces if piece.type in (_NORMAL, _USER_DEFINED)]
    pairs = {piece[at : at + 2] for piece in normal for at in range(len(piece) - 1)}
    names = [piece.piece for piece in model.pieces if piece.type in (_CONTROL, _UNKNOWN, _BYTE)]
    behind: dict[str, list[str]] = {}
    for name in names:
        cut = next((at for at in range(1, len(name)) if name[at - 1 : at + 1] not in pairs), None)
        if cut is not None:
            behind.setdefault(name[:cut], []).append(name[cut:])
    if not behind:
        return None
    parts = [f"(?<={_quoted(head)})(?:{_alternatives(tails)})" for head, tails in sorted(behind.items())]
    pattern = {"Regex": "|".join(parts)}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithNext", "invert": False}


def _alternatives(texts: Sequence[str]) -> str:
    if len(texts) == 256 and all(_BYTE_NAME.fullmatch(f"<{text}") for text in texts):
        return "0x[0-9A-F]{2}>"
    return "|".join(_quoted(text) for text in texts)


def _quoted(text: str) -> str:
    return "".join(rf"\x{{{ord(character):x}}}" for character in text)


def _bpe(model: Any) -> dict[str, Any]:
    """BPE by scores as BPE by merges: every way to put a piece together, pieces of higher score first."""
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    usable = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    ordered = sorted(
        (piece for piece in model.pieces if piece.type == _NORMAL), key=lambda piece: piece.score, reverse=True
    )
    merges = [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in ordered
        # The longest left part first: what sentencepiece takes of two ways that overlap.
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

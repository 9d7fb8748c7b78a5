"""Exports a checkpoint's tokenizer to transformers, with the special-token policy of its training data, and checks that
both give the same ids."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prealign.conversion.clone_definition import clone_definition
from megatron_prealign.conversion.sentencepiece_definition import Definition, sentencepiece_definition
from megatron_prealign.errors import UserError
from megatron_prealign.text import plural
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.clone import CloneTokenizer
from megatron_prealign.tokenizer.huggingface import HuggingFaceTokenizer, read_config, read_definition
from megatron_prealign.tokenizer.load import load_tokenizer

# Roles of special tokens other than bos_token and eos_token.
_ROLES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Fields of tokenizer_config.json that are kept: they do not affect ids.
_KEPT_FIELDS = ("additional_special_tokens", "extra_special_tokens", "chat_template", "padding_side")
_CHAT_TEMPLATE = "chat_template.jinja"
# For these families transformers 5 uses its own class, which reads only the vocabulary of tokenizer.json and splits
# texts like Qwen's tokenizer, regardless of the rest of the file and of tokenizer_config.json.
_OWN_CLASS = {"qwen2": ("Qwen2Tokenizer", "Qwen2TokenizerFast")}
_PLAIN_MODULE, _PLAIN_CLASS = "plain_tokenizer", "PlainTokenizer"
_PLAIN_SOURCE = f'''\
"""Loads all of tokenizer.json: transformers' own class for this model family reads only its vocabulary."""

from transformers import PreTrainedTokenizerFast


class {_PLAIN_CLASS}(PreTrainedTokenizerFast):
    pass
'''
_CHECK_TEXTS = (
    "The quick brown fox jumps over the lazy dog; it didn't wait.",
    "Größe, Übermut und Straßenbahnfahrer – „Zitat“, 3,14 €.",
    "L'été dernier, nous étions à Nîmes : « où ça ? »",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia. ¿Sí? ¡No!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "色は匂へど散りぬるを、我が世誰ぞ常ならむ。カタカナとﾊﾝｶｸ。",
    "天地玄黃,宇宙洪荒。机器学习模型",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "ทดสอบภาษาไทย हिन्दी पाठ עברית Ελληνικά",
    "",
    " ",
    "   ",
    "a",
    " a",
    "  a",
    "a ",
    "a  b   c    d     e",
    "\n",
    "\n\n\tindented\n    four\n\r\nend\n",
    "tab\tand\u00a0hard\u3000wide\u2003space",
    "0 1 12 123 1234 12345 1,234.56 -7 2^10 0x1F",
    "def f(x):\n    return {'a': [x, x + 1]}  # comment\n",
    "https://example.org/a?b=c&d=%20 user@example.org",
    "🙂🙃 👨‍👩‍👧‍👦 🇩🇪 ❤️ 🏳️‍🌈",
    "e\u0301 é ﬁ ① ½ Å \u200b\u200d\ufeff",
    "ALLCAPS CamelCase snake_case kebab-case I'LL we've",
    "x" * 300,
    "<0x0A> [UNK] <mask> ▁ Ġ ##",
)
_PIECES_PER_TEXT, _NUM_PIECE_TEXTS = 12, 300
# Fraction of texts that may differ for unigram vocabularies, where the two libraries break ties differently. More than
# that is an error.
_UNIGRAM_TOLERANCE = 0.01


@dataclass
class TokenizerExport:
    """Summary of an exported tokenizer, for config.json, generation_config.json and the model card."""

    eod_id: int
    eod_token: str
    kind: str
    """Human-readable description of its source."""
    converted: bool = True
    """False for files copied unchanged, which keep their own special-token policy."""
    notes: list[str] = field(default_factory=list)
    """Warnings for the user."""


def export_tokenizer(source: Path, output: Path, *, family: str, max_length: int) -> TokenizerExport:
    """Writes `tokenizer.json` and `tokenizer_config.json` into `output`.

    Both bos_token and eos_token are the end-of-document token, as in the training data, where documents have no token
    before them; encoding adds no tokens.

    Args:
        source: The directory `tokenizer` of a checkpoint, or any path that `load_tokenizer` accepts.
        family: `model.family`.
        max_length: Context length in tokens.

    Raises:
        UserError: the tokenizer is corrupt, or transformers cannot reproduce its ids.
    """
    tokenizer = load_tokenizer(source)
    base = tokenizer.base if isinstance(tokenizer, CloneTokenizer) else tokenizer
    config: dict[str, Any] = {}
    notes = [
        "The name of a special token inside a text is encoded as that token, unlike in the training data; "
        "`split_special_tokens=True` encodes it as plain text."
    ]
    if isinstance(base, HuggingFaceTokenizer):
        directory = base.path
        definition, config, kind = _cleaned(read_definition(directory)), read_config(directory), "tokenizers"
        # Newer versions of transformers store it here; they also read the one in the config.
        if (directory / _CHAT_TEMPLATE).is_file():
            shutil.copyfile(directory / _CHAT_TEMPLATE, output / _CHAT_TEMPLATE)
    else:
        definition, kind = sentencepiece_definition(base.path), f"sentencepiece ({base.path.name})"
        notes += _sentencepiece_notes(definition)
    tokens = {number: token for token, number in _all_tokens(definition).items()}
    if isinstance(tokenizer, CloneTokenizer):
        definition = clone_definition(definition, base.vocab_size)
        kind += f", cloned as {tokenizer.language}"
        notes.append(
            f"Ids from {base.vocab_size:,} on are the language `{tokenizer.language}`: id + {base.vocab_size:,} is the "
            "clone of an ordinary id. The tokenizer encodes every text with ordinary ids; add this offset to get the "
            "cloned language. Runs of cloned ids decode to their text between ⟦ and ⟧."
        )
    eod = tokens[base.eod_id]
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod,
        "eos_token": eod,
        **_roles(config, set(tokens.values())),
        **{name: config[name] for name in _KEPT_FIELDS if name in config},
        # Older versions of transformers would add token_type_ids, which none of the models accepts.
        "model_input_names": ["input_ids", "attention_mask"],
        # Otherwise decoding would change the text.
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    if family in _OWN_CLASS:
        content |= _own_class(config, output, family)
    (output / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    write_json(output / "tokenizer_config.json", content)
    return TokenizerExport(base.eod_id, eod, kind, notes=notes)


def export_unchanged(source: Path, output: Path) -> TokenizerExport:
    """Copies the tokenizer's files unchanged, for tokenizers that `export_tokenizer` cannot convert and for imported
    models that were not trained since.

    Raises:
        UserError: the tokenizer is corrupt.
    """
    tokenizer = load_tokenizer(source)
    for file in sorted(source.iterdir()):
        if file.is_file():
            shutil.copyfile(file, output / file.name)
    return TokenizerExport(
        tokenizer.eod_id,
        tokenizer.decode([tokenizer.eod_id]),
        f"{tokenizer.library}, files copied unchanged",
        converted=False,
    )


def write_json(path: Path, content: Any) -> None:
    """Writes JSON in the format of transformers' configs."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cleaned(definition: Definition) -> Definition:
    """The definition without truncation, padding, dropout and special tokens around a text, which the training data did
    not have. Serialised again by the library, which assigns some added tokens other ids than older files have."""
    import tokenizers

    model = {**definition["model"], **({"dropout": None} if "dropout" in definition["model"] else {})}
    changed = {
        "truncation": None,
        "padding": None,
        "post_processor": _without_added_tokens(definition.get("post_processor")),
        "model": model,
    }
    content: Definition = json.loads(tokenizers.Tokenizer.from_str(json.dumps({**definition, **changed})).to_str())
    return content


def _without_added_tokens(part: Any) -> Any:
    """The parts of a post-processor that add no tokens."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "ByteLevel":
        return part
    if part.get("type") == "Sequence":
        kept = [_without_added_tokens(item) for item in part.get("processors") or []]
        kept = [item for item in kept if item is not None]
        return {**part, "processors": kept} if kept else None
    return None


def _all_tokens(definition: Definition) -> dict[str, int]:
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in definition["added_tokens"]}}


def _roles(config: dict[str, Any], known: set[str]) -> dict[str, str]:
    """Special tokens with other roles. A token missing from the vocabulary is left out: transformers would add it, with
    an id beyond the model's embedding."""
    roles = {}
    for role in _ROLES:
        value = config.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content in known:
            roles[role] = content
    return roles


def own_class_notes(path: Path, family: str) -> list[str]:
    """Warning about a tokenizer whose ids transformers 5 does not reproduce in a model directory of this family."""
    if family not in _OWN_CLASS or (path.is_dir() and read_config(path).get("tokenizer_class") in _OWN_CLASS[family]):
        return []
    return [
        f"transformers 5 loads every {family} directory with its own class ({_OWN_CLASS[family][0]}), which reads only "
        "the vocabulary of this tokenizer and may produce different ids than training; use convert "
        "to-hf --tokenizer convert to write a directory that keeps the ids"
    ]


def _own_class(config: dict[str, Any], output: Path, family: str) -> dict[str, Any]:
    name = config.get("tokenizer_class")
    if name in _OWN_CLASS[family]:
        return {"tokenizer_class": name}
    (output / f"{_PLAIN_MODULE}.py").write_text(_PLAIN_SOURCE, encoding="utf-8")
    # Naming a class keeps transformers from using its own; without trust_remote_code it falls back to the generic one.
    return {"auto_map": {"AutoTokenizer": [None, f"{_PLAIN_MODULE}.{_PLAIN_CLASS}"]}}


def _sentencepiece_notes(definition: Definition) -> list[str]:
    notes = []
    if definition["model"]["type"] == "Unigram":
        notes.append(
            "Unigram model: sentencepiece, which encoded the training data, sums scores over a whole text in 32 bits, "
            "transformers in 64. They may differ where two segmentations have nearly equal scores: measured on eight "
            "languages, at most 8 in 100,000 tokens of whole documents, almost none in single lines."
        )
    if any(step["type"] == "Precompiled" for step in definition["normalizer"]["normalizers"]):
        notes.append(
            "The model normalises characters (NFKC). If a replaced character is followed by another combining mark or "
            "joiner, transformers drops that mark and sentencepiece keeps it."
        )
    return notes


def check_tokenizer(source: Path, output: Path, vocab_size: int) -> list[str]:
    """Like `compare_tokenizer`, for ids that must be equal.

    Raises:
        UserError: ids differ, or there are more ids than embedding rows.
    """
    problem, notes = compare_tokenizer(source, output, vocab_size)
    if problem:
        raise UserError(f"{source}: {problem}; use --tokenizer copy")
    return notes


def compare_tokenizer(
    source: Path, output: Path, vocab_size: int, *, add_special_tokens: bool = True
) -> tuple[str, list[str]]:
    """Loads the exported tokenizer with transformers and compares its ids with those of the source.

    Args:
        source: `source` of `export_tokenizer`.
        output: The model directory, with config.json.
        vocab_size: Number of embedding rows.
        add_special_tokens: Let transformers add special tokens around a text, which training does not.

    Returns:
        The problem, empty if there is none; notes for the user about known differences that occurred.
    """
    from transformers import AutoTokenizer

    mcore = load_tokenizer(source)
    try:
        hf = AutoTokenizer.from_pretrained(str(output), local_files_only=True)
    except Exception as error:  # transformers raises many types.
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return f"transformers cannot load the exported tokenizer ({reason})", []
    if len(hf) > vocab_size:
        return f"transformers has {plural(len(hf), 'token')}, the model only {vocab_size:,}", []
    # Only a warning about long texts depends on it.
    hf.model_max_length = 1 << 40
    # Both match added tokens that are not special in a text.
    names = [str(token) for token in hf.added_tokens_decoder.values() if token.special]
    texts = [text for text in (*_CHECK_TEXTS, *_piece_texts(mcore)) if not any(name in text for name in names)]
    expected = mcore.encode_batch(texts)
    got = [hf(text, add_special_tokens=add_special_tokens).input_ids for text in texts]
    different = [number for number in range(len(texts)) if list(got[number]) != expected[number]]
    if not different:
        return "", []
    first = texts[different[0]][:60]
    # Tokenizers without a backend are Python wrappers of sentencepiece.
    unigram = type(getattr(getattr(hf, "backend_tokenizer", None), "model", None)).__name__ == "Unigram"
    if not unigram or len(different) > _UNIGRAM_TOLERANCE * len(texts):
        return (
            f"transformers produces different ids than training for {len(different)} of {len(texts)} test texts, first "
            f"for {first!r}"
        ), []
    return "", [f"ids of {len(different)} of {len(texts)} test texts differ from sentencepiece's, first for {first!r}"]


def _piece_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts of pieces sampled evenly from the vocabulary."""
    base = tokenizer.base if isinstance(tokenizer, CloneTokenizer) else tokenizer
    ids = [number for number in range(base.vocab_size) if number not in base.special_ids]
    step = max(1, len(ids) // (_PIECES_PER_TEXT * _NUM_PIECE_TEXTS))
    chosen: Sequence[int] = ids[::step]
    starts = range(0, len(chosen), _PIECES_PER_TEXT)
    return [base.decode(chosen[start : start + _PIECES_PER_TEXT]) for start in starts]

"""A checkpoint's tokenizer for transformers, with the policy of the data it was trained on, and the proof that both
give the same ids."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prealign.conversion.clone_definition import clone_definition
from megatron_prealign.conversion.sentencepiece_definition import Definition, sentencepiece_definition
from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.clone import CloneTokenizer
from megatron_prealign.tokenizer.huggingface import HuggingFaceTokenizer, read_config, read_definition
from megatron_prealign.tokenizer.load import load_tokenizer

# Roles of tokens beside begin and end of a document.
_ROLES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a tokenizer's author said that decides no ids.
_KEPT = ("additional_special_tokens", "extra_special_tokens", "chat_template", "padding_side")
_CHAT_TEMPLATE = "chat_template.jinja"
# transformers 5 takes its own class for these families, reads the vocabulary alone of a tokenizer.json and cuts texts
# as Qwen's tokenizer does, whatever the file and the tokenizer's config say.
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
_PIECES_A_TEXT, _PIECE_TEXTS = 12, 300
# Unigram vocabularies: paths of equal score, which the two libraries may decide in two ways. Above it is no accident.
_UNIGRAM_TOLERANCE = 0.01


@dataclass
class TokenizerExport:
    """What was written, for config.json, generation_config.json and the model card."""

    eod_id: int
    eod_token: str
    kind: str
    """What it was made from, for people."""
    converted: bool = True
    """False for files as they were, whose policy is that of those who made them."""
    notes: list[str] = field(default_factory=list)
    """What a user should know."""


def export_tokenizer(source: Path, output: Path, *, family: str, max_length: int) -> TokenizerExport:
    """Writes `tokenizer.json` and `tokenizer_config.json` into `output`.

    Beginning and end of a document are the end-of-document token, as the training data had it: no token stands in front
    of a document, and encoding adds none.

    Args:
        source: A checkpoint's directory `tokenizer`, or what `load_tokenizer` takes.
        family: `model.family`.
        max_length: Positions that the model can take, in tokens.

    Raises:
        UserError: the tokenizer is damaged, or transformers has no way to give the same ids.
    """
    tokenizer = load_tokenizer(source)
    base = tokenizer.base if isinstance(tokenizer, CloneTokenizer) else tokenizer
    config: dict[str, Any] = {}
    notes = [
        "The name of a special token inside a text is read as that token. The training data never had it so; "
        "`split_special_tokens=True` reads it as plain text."
    ]
    if isinstance(base, HuggingFaceTokenizer):
        directory = base.path
        definition, config, kind = _cleaned(read_definition(directory)), read_config(directory), "tokenizers"
        # How newer versions of transformers keep it; they read the one in the config, too.
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
            "clone of an ordinary id. The tokenizer encodes every text with ordinary ids; add the number to the ids of "
            "a text to have it in the cloned language. Runs of cloned ids decode to their text between ⟦ and ⟧."
        )
    eod = tokens[base.eod_id]
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod,
        "eos_token": eod,
        **_roles(config, set(tokens.values())),
        **{name: config[name] for name in _KEPT if name in config},
        # Older versions of transformers would add token types, which none of the models takes.
        "model_input_names": ["input_ids", "attention_mask"],
        # Both would change what decodes.
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    if family in _OWN_CLASS:
        content |= _own_class(config, output, family)
    (output / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    write_json(output / "tokenizer_config.json", content)
    return TokenizerExport(base.eod_id, eod, kind, notes=notes)


def export_unchanged(source: Path, output: Path) -> TokenizerExport:
    """Copies the tokenizer's files as they are, for what `export_tokenizer` cannot carry over and for models that were
    never trained here.

    Raises:
        UserError: the tokenizer is damaged.
    """
    tokenizer = load_tokenizer(source)
    for file in sorted(source.iterdir()):
        if file.is_file():
            shutil.copyfile(file, output / file.name)
    return TokenizerExport(
        tokenizer.eod_id,
        tokenizer.decode([tokenizer.eod_id]),
        f"{tokenizer.library}, files as they were",
        converted=False,
    )


def write_json(path: Path, content: Any) -> None:
    """As transformers writes its configs."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cleaned(definition: Definition) -> Definition:
    """Without what makes ids depend on length, batch or chance, and without tokens that the data did not have; written
    by the library, which gives some added tokens other ids than older files say."""
    import tokenizers

    model = {**definition["model"], **({"dropout": None} if "dropout" in definition["model"] else {})}
    changed = {
        "truncation": None,
        "padding": None,
        "post_processor": _only_offsets(definition.get("post_processor")),
        "model": model,
    }
    content: Definition = json.loads(tokenizers.Tokenizer.from_str(json.dumps({**definition, **changed})).to_str())
    return content


def _only_offsets(part: Any) -> Any:
    """The parts of a post-processor that add no tokens."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "ByteLevel":
        return part
    if part.get("type") == "Sequence":
        kept = [_only_offsets(item) for item in part.get("processors") or []]
        kept = [item for item in kept if item is not None]
        return {**part, "processors": kept} if kept else None
    return None


def _all_tokens(definition: Definition) -> dict[str, int]:
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in definition["added_tokens"]}}


def _roles(config: dict[str, Any], known: set[str]) -> dict[str, str]:
    """The other roles. A name that the vocabulary lacks is left out: transformers would add it, with an id that the
    model has no row for."""
    roles = {}
    for role in _ROLES:
        value = config.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content in known:
            roles[role] = content
    return roles


def own_class_notes(path: Path, family: str) -> list[str]:
    """What is said of a tokenizer whose ids transformers 5 would not give in a directory of this family."""
    if family not in _OWN_CLASS or (path.is_dir() and read_config(path).get("tokenizer_class") in _OWN_CLASS[family]):
        return []
    return [
        f"transformers 5 opens every {family} directory with a class of its own ({_OWN_CLASS[family][0]}), which takes "
        "the vocabulary alone of this tokenizer and may give other ids than training here, where the whole of it is "
        "used; convert to-hf --tokenizer convert writes a directory that keeps the ids"
    ]


def _own_class(config: dict[str, Any], output: Path, family: str) -> dict[str, Any]:
    name = config.get("tokenizer_class")
    if name in _OWN_CLASS[family]:
        return {"tokenizer_class": name}
    (output / f"{_PLAIN_MODULE}.py").write_text(_PLAIN_SOURCE, encoding="utf-8")
    # Naming a class keeps transformers from choosing its own; without trust_remote_code it takes the plain one.
    return {"auto_map": {"AutoTokenizer": [None, f"{_PLAIN_MODULE}.{_PLAIN_CLASS}"]}}


def _sentencepiece_notes(definition: Definition) -> list[str]:
    notes = []
    if definition["model"]["type"] == "Unigram":
        notes.append(
            "A unigram model: sentencepiece, which encoded the training data, adds up scores in 32 bits over a whole "
            "text, transformers in 64. Where two ways to cut a word are nearly as good they may differ: measured on "
            "eight languages, at most 8 tokens in 100,000 of whole documents, next to none in single lines."
        )
    if any(step["type"] == "Precompiled" for step in definition["normalizer"]["normalizers"]):
        notes.append(
            "The model normalises characters (NFKC). Where a character that is replaced has a further combining mark "
            "or joiner behind it, transformers drops that mark and sentencepiece keeps it."
        )
    return notes


def check_tokenizer(source: Path, output: Path, vocab_size: int) -> list[str]:
    """As `compare_tokenizer`, for ids that must be equal.

    Raises:
        UserError: ids differ, or there are more of them than the model has rows.
    """
    problem, notes = compare_tokenizer(source, output, vocab_size)
    if problem:
        raise UserError(f"{source}: {problem}; use --tokenizer copy")
    return notes


def compare_tokenizer(
    source: Path, output: Path, vocab_size: int, *, add_special_tokens: bool = True
) -> tuple[str, list[str]]:
    """Opens the written tokenizer with transformers and compares ids with those of the training's.

    Args:
        source: What `export_tokenizer` was given.
        output: The directory, with config.json.
        vocab_size: Rows of the embedding.
        add_special_tokens: Let transformers put tokens around a text, which training does not.

    Returns:
        What is wrong, in words, empty if nothing is; lines for the user about differences that were found and are
        known to occur.
    """
    from transformers import AutoTokenizer

    mcore = load_tokenizer(source)
    try:
        hf = AutoTokenizer.from_pretrained(str(output), local_files_only=True)
    except Exception as error:  # transformers raises many kinds.
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return f"transformers does not open this tokenizer once it is written ({reason})", []
    if len(hf) > vocab_size:
        return f"transformers finds {len(hf):,} tokens, the model has {vocab_size:,}", []
    # Only a warning about long texts depends on it.
    hf.model_max_length = 1 << 40
    # Added tokens that are not special are found in a text by both.
    names = [str(token) for token in hf.added_tokens_decoder.values() if token.special]
    texts = [text for text in (*_CHECK_TEXTS, *_piece_texts(mcore)) if not any(name in text for name in names)]
    expected = mcore.encode_batch(texts)
    found = [hf(text, add_special_tokens=add_special_tokens).input_ids for text in texts]
    different = [number for number in range(len(texts)) if list(found[number]) != expected[number]]
    if not different:
        return "", []
    first = texts[different[0]][:60]
    # Those without a backend are sentencepiece's own, as Python code.
    unigram = type(getattr(getattr(hf, "backend_tokenizer", None), "model", None)).__name__ == "Unigram"
    if not unigram or len(different) > _UNIGRAM_TOLERANCE * len(texts):
        return (
            f"transformers gives other ids than training here in {len(different)} of {len(texts)} test texts, first "
            f"in {first!r}"
        ), []
    return "", [f"ids of {len(different)} of {len(texts)} test texts differ from sentencepiece's, first in {first!r}"]


def _piece_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts out of pieces from all over the vocabulary."""
    base = tokenizer.base if isinstance(tokenizer, CloneTokenizer) else tokenizer
    ids = [number for number in range(base.vocab_size) if number not in base.special_ids]
    step = max(1, len(ids) // (_PIECES_A_TEXT * _PIECE_TEXTS))
    chosen: Sequence[int] = ids[::step]
    starts = range(0, len(chosen), _PIECES_A_TEXT)
    return [base.decode(chosen[start : start + _PIECES_A_TEXT]) for start in starts]

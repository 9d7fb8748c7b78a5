"""Hugging Face tokenizer directories: byte-level BPE and metaspace (Llama, T5, XLM-R style), with `tokenizers`."""

import copy
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import orjson

from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.base import EOD_NAMES, Tokenizer
from megatron_prealign.tokenizer.gigatoken_engine import RowEngine, engine_for_definition
from megatron_prealign.tokenizer.word_batches import BatchWordEncoder
from megatron_prealign.tokenizer.word_boundaries import byte_level_alphabet, vocabulary_flags

if TYPE_CHECKING:
    import tokenizers

# Vocabulary files of older directories.
_VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
METASPACE = "▁"
# Parts of tokenizer.json that do not change the ids of a text encoded without special tokens.
_IRRELEVANT = ("version", "truncation", "padding", "post_processor", "decoder")


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer of a directory with `tokenizer.json`, or of one that transformers can convert to it."""

    library = "tokenizers"

    def __init__(self, path: Path) -> None:
        self.path = path
        data = read_definition(path)
        config = read_config(path)
        # Padding, truncation and dropout would make ids depend on the batch, the length or a random draw.
        # The post-processor adds special tokens, which are not used here, and trims white space from the offsets.
        data.update(truncation=None, padding=None, post_processor=None)
        if data["model"].get("dropout"):
            data["model"]["dropout"] = None
        self._definition = data
        self._tokenizer = _build(data, path)
        self._batch_encoders: dict[bool, BatchWordEncoder] = {}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._vocabulary = vocabulary
        self._byte_level = _has_type(data.get("decoder"), "ByteLevel") or _has_type(
            data.get("pre_tokenizer"), "ByteLevel"
        )
        named = _named_tokens(config)
        eod = named.get("eos_token") or next((name for name in EOD_NAMES if name in vocabulary), None)
        if eod is None:
            raise UserError(
                f"{path}: no end-of-document token, expected eos_token in tokenizer_config.json or one of the tokens "
                f"{', '.join(EOD_NAMES)}"
            )
        if eod not in vocabulary:
            raise UserError(
                f"{path}: eos_token {eod!r} in tokenizer_config.json is not in the vocabulary; set an existing token"
            )
        self.eod_id = vocabulary[eod]
        unknown = data["model"].get("unk_token")
        self.special_ids = frozenset(
            {self.eod_id}
            | {token["id"] for token in data.get("added_tokens") or [] if token["special"]}
            | {vocabulary[name] for name in [*named.values(), unknown] if name in vocabulary}
            | ({data["model"]["unk_id"]} if data["model"].get("unk_id") is not None else set())
        )
        self.fingerprint = _fingerprint(self._tokenizer, self.eod_id)

    def encode(self, text: str, language: str | None = None) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], language: str | None = None) -> list[list[int]]:
        return _batch(self._tokenizer, list(texts))

    def fast_engine(self, language: str | None = None) -> RowEngine | None:
        return self._fast_engine

    @cached_property
    def _fast_engine(self) -> RowEngine | None:
        # One engine for all languages, because each has its own word cache.
        return engine_for_definition(self._definition)

    def encode_with_offsets(self, text: str, language: str | None = None) -> tuple[list[int], numpy.ndarray]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, numpy.array(encoding.offsets, dtype=numpy.int64).reshape(-1, 2)

    def encode_words(
        self, words: Sequence[str], language: str | None = None, word_initial: bool = True
    ) -> list[list[int]]:
        if not word_initial:
            return _batch(self._bare, list(words))
        # The prefix of a normaliser would be added to the space; that of a pre-tokeniser would not.
        tokenizer = self._bare if _has_type(self._definition.get("normalizer"), "Prepend") else self._tokenizer
        return _batch(tokenizer, [" " + word for word in words])

    def encode_word_rows(
        self, words: Sequence[str], language: str | None = None, word_initial: bool = True
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        if word_initial not in self._batch_encoders:
            prefix, tokenizer, definition = " ", self._tokenizer, self._definition
            if not word_initial:
                prefix, tokenizer = "", self._bare
                definition = _without_prefix(definition)
            self._batch_encoders[word_initial] = BatchWordEncoder(
                tokenizer, definition, prefix, lambda sample: self.encode_words(sample, word_initial=word_initial)
            )
        encoded = self._batch_encoders[word_initial].encode(words)
        if encoded is None:
            self.word_encoder = "tokenizers, word by word"
            return super().encode_word_rows(words, language, word_initial)
        ids, offsets, self.word_encoder = encoded
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)

    def word_boundaries(self) -> numpy.ndarray:
        return self._flags.copy()

    @cached_property
    def _flags(self) -> numpy.ndarray:
        alphabet = byte_level_alphabet()
        added = {token["id"] for token in self._definition.get("added_tokens") or []}
        tokens: list[bytes | str | None] = [None] * self.vocab_size
        for token, index in self._vocabulary.items():
            if index in self.special_ids:
                continue
            if index in added:
                # Added tokens are in the vocabulary as plain text, not in the byte alphabet.
                tokens[index] = token
            elif self._byte_level and all(character in alphabet for character in token):
                tokens[index] = bytes(alphabet[character] for character in token)
            else:
                tokens[index] = piece_content(token)
        return vocabulary_flags(tokens)

    @cached_property
    def _bare(self) -> "tokenizers.Tokenizer":
        """The tokenizer without a space prepended to the text: for words that follow another character."""
        return _build(_without_prefix(self._definition), self.path)


def piece_content(piece: str) -> bytes | str:
    """Text of a sentencepiece-style piece, or byte of a byte-fallback piece such as `<0x0A>`."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return piece
    return piece.replace(METASPACE, " ")


def _batch(tokenizer: "tokenizers.Tokenizer", texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _build(data: dict[str, Any], path: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(orjson.dumps(data).decode())
    except Exception as error:  # `tokenizers` raises bare Exception for any error in a definition.
        raise UserError(f"{path}/tokenizer.json: cannot be loaded by the tokenizers library: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_definition(path: Path) -> dict[str, Any]:
    """Reads tokenizer.json, or converts an older directory with transformers."""
    file = path / "tokenizer.json"
    try:
        data = orjson.loads(file.read_bytes() if file.exists() else _convert(path))
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"{file}: cannot read JSON: {error}; save the tokenizer again") from error
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise UserError(f"{file}: not a tokenizer ('model' is missing); save the tokenizer again with save_pretrained")
    return data


def _convert(path: Path) -> bytes:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, use_fast=True)
        return tokenizer.backend_tokenizer.to_str().encode()
    except Exception as error:  # transformers raises many exception types.
        if not any((path / name).exists() for name in _VOCABULARIES):
            raise UserError(
                f"{path}: no vocabulary, only tokenizer_config.json; also copy tokenizer.json or the other vocabulary "
                "files"
            ) from error
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path}: transformers cannot load this tokenizer: {reason}; save it with tokenizer.json"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    # The later file takes precedence, as in transformers.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = path / name
        if file.exists():
            try:
                content = orjson.loads(file.read_bytes())
            except orjson.JSONDecodeError as error:
                raise UserError(f"{file}: invalid JSON ({error}); save the tokenizer again") from error
            if not isinstance(content, dict):
                raise UserError(f"{file}: not a JSON object; save the tokenizer again")
            config.update({key: value for key, value in content.items() if value is not None})
    return config


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Returns the tokens with a role (`eos_token`, `pad_token`, ...), each given as a string or an object."""
    named: dict[str, str] = {}
    for role in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[role] = content
    return named


def _has_type(part: Any, kind: str) -> bool:
    """Whether a component of tokenizer.json has type `kind`, or contains one in a sequence."""
    if isinstance(part, list):
        return any(_has_type(item, kind) for item in part)
    if isinstance(part, dict):
        return part.get("type") == kind or any(_has_type(value, kind) for value in part.values())
    return False


def _without_prefix(data: dict[str, Any]) -> dict[str, Any]:
    """Returns a definition that does not prepend a space to a text. The vocabulary is shared, because copying a large
    one is slow."""
    data = data | {key: copy.deepcopy(data[key]) for key in ("normalizer", "pre_tokenizer") if key in data}
    data["normalizer"] = _strip_prepend(data.get("normalizer"))
    _disable_prefix(data.get("pre_tokenizer"))
    return data


def _strip_prepend(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") == "Prepend":
        return None
    if part.get("type") == "Sequence":
        kept = [_strip_prepend(item) for item in part["normalizers"]]
        part["normalizers"] = [item for item in kept if item is not None]
    return part


def _disable_prefix(part: Any) -> None:
    if not isinstance(part, dict):
        return
    if part.get("type") == "Metaspace":
        part["prepend_scheme"] = "never"
        # Older form of the same option; if both are present, they must agree.
        part.pop("add_prefix_space", None)
    elif part.get("type") == "ByteLevel":
        part["add_prefix_space"] = False
    for item in part.get("pretokenizers") or []:
        _disable_prefix(item)


def _canonical(value: Any) -> Any:
    """Drops null and false, which newer library versions add as defaults when they save a tokenizer again."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items() if item is not None and item is not False}
    return [_canonical(item) for item in value] if isinstance(value, list) else value


def _fingerprint(tokenizer: "tokenizers.Tokenizer", eod_id: int) -> str:
    # The library's serialisation, not the file: it writes merges and defaults in a canonical form.
    data = orjson.loads(tokenizer.to_str())
    kept = {key: value for key, value in data.items() if key not in _IRRELEVANT}
    content = orjson.dumps(_canonical({**kept, "eod_id": eod_id}), option=orjson.OPT_SORT_KEYS)
    return "sha256:" + hashlib.sha256(content).hexdigest()

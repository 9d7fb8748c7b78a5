"""The sidecar, a .json file next to .bin/.idx: tokenizer, counts, inputs and skipped documents of a dataset."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_prealign.corpus.readers import Problem
from megatron_prealign.errors import UserError
from megatron_prealign.files.json_text import load_json
from megatron_prealign.languages import check_language_code

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenizerRecord:
    """Tokenizer that produced the ids."""

    path: str
    """Path at preprocessing time; a hint only, the fingerprint identifies the tokenizer."""
    fingerprint: str
    """`sha256:<hex>` of everything that affects the ids."""
    vocab_size: int
    """Number of ids."""


@dataclass(frozen=True)
class InputRecord:
    """An input file."""

    path: str
    """Path as passed on the command line."""
    bytes: int
    """Size on disk."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Metadata of a preprocessed dataset that its token files do not contain."""

    language: str
    """Language code of every document."""
    tokenizer: TokenizerRecord
    """Tokenizer that produced the ids."""
    eod_id: int
    """End-of-document id."""
    append_eod: bool = True
    """Whether every document ends with `eod_id`."""
    bos: bool = False
    """Whether every document starts with a BOS token."""
    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens, including end-of-document tokens."""
    bytes: int
    """UTF-8 bytes of the tokenised text; 0 if unknown after a repair."""
    skipped: list[Problem] = field(default_factory=list)
    """The first skipped documents and files."""
    skipped_count: int = 0
    """Number of all skipped documents and files."""
    inputs: list[InputRecord] = field(default_factory=list)
    """Input files."""
    segmenter: str | None = None
    """Segmenter that produced PREFIX.words; None if that file does not exist."""
    checksums: dict[str, str] = field(default_factory=dict)
    """File extension (`bin`, `idx`, `words`) -> `file_checksum` of the file; empty if not computed."""
    engine: str = ""
    """Human-readable description of the encoder; empty after a repair without a sidecar."""
    text_keys: list[str] = field(default_factory=list)
    """Keys (or columns) that the text was read from; empty after a repair without a sidecar."""
    shard: str | None = None
    """Shard of the inputs, `3/8` for the third of eight; None for all inputs."""
    format_version: int = FORMAT_VERSION
    """Version of the sidecar format."""


def sidecar_path(prefix: str | Path) -> Path:
    """`PREFIX.json`."""
    return Path(f"{prefix}.json")


def write_sidecar(sidecar: Sidecar, path: Path) -> None:
    """Writes the sidecar directly to `path`, not atomically: callers rename a group of files together."""
    # File names that are not valid UTF-8 are written as escapes.
    path.write_text(json.dumps(asdict(sidecar), indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def load_sidecar(prefix: str | Path) -> Sidecar:
    """Reads `PREFIX.json`.

    Args:
        prefix: Path of the dataset without extension.

    Raises:
        UserError: The file is missing, not JSON or of another format version, or a field is missing or has the wrong
            type.
    """
    path = sidecar_path(prefix)
    try:
        data = load_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: file not found; create the dataset with megatron-prealign preprocess, or, if its .bin exists, "
            "restore the missing files with megatron-prealign dataset repair"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({error}); restore it with megatron-prealign dataset repair"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object; recreate the dataset with megatron-prealign preprocess")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}; "
            "recreate the dataset with this version of megatron-prealign preprocess"
        )
    sidecar = Sidecar(
        **{
            **_typed(Sidecar, data, str(path)),
            "tokenizer": _nested(TokenizerRecord, data["tokenizer"], f"{path}: tokenizer"),
            "skipped": [_nested(Problem, item, f"{path}: skipped") for item in data["skipped"]],
            "inputs": [_nested(InputRecord, item, f"{path}: inputs") for item in data["inputs"]],
        }
    )
    check_language_code(sidecar.language, f"{path}: language")
    return sidecar


def _nested(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"{where}: {data!r} is not a JSON object; recreate the dataset")
    return kind(**_typed(kind, data, where))


def _typed(kind: type, data: dict[str, Any], where: str) -> dict[str, Any]:
    """Values of the fields of dataclass `kind`, type-checked; unknown keys are ignored."""
    values: dict[str, Any] = {}
    for item in fields(kind):
        optional = item.type == (str | None)
        if item.name not in data:
            raise UserError(f"{where}: field {item.name!r} is missing; recreate the dataset")
        value = data[item.name]
        if value is None and optional:
            values[item.name] = value
            continue
        # Field types are classes, not strings, since this module has no postponed annotations; generic ones are lists.
        expected: Any = item.type if item.type in (str, int, bool) else list
        if optional:
            expected = str
        elif item.type in (TokenizerRecord, dict[str, str]):
            expected = dict
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            raise UserError(
                f"{where}: field {item.name!r} is {value!r}, expected {expected.__name__}; recreate the dataset"
            )
        if item.type in (dict[str, str], list[str]):
            parts = value.values() if expected is dict else value
            if not all(isinstance(part, str) for part in parts):
                raise UserError(
                    f"{where}: field {item.name!r} is {value!r}, expected only strings; recreate the dataset"
                )
        values[item.name] = value
    return values

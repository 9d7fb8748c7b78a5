"""The .json file beside .bin/.idx: what the tokens are, how they were made and what was left out."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_prealign.corpus.readers import Problem
from megatron_prealign.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the ids."""

    path: str
    """Where it lay; a hint only, the fingerprint decides."""
    fingerprint: str
    """`sha256:<hex>` of everything that decides ids."""
    vocab_size: int
    """Number of ids."""


@dataclass(frozen=True)
class InputRecord:
    """One file that was read."""

    path: str
    """As given on the command line."""
    bytes: int
    """Its size on disk."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The facts about one preprocessed dataset that its token file cannot tell."""

    language: str
    """Language code of every document."""
    tokenizer: TokenizerRecord
    """The tokenizer that made the ids."""
    eod_id: int
    """The end-of-document id."""
    append_eod: bool = True
    """Whether every document ends with `eod_id`."""
    bos: bool = False
    """Whether every document starts with a BOS token."""
    documents: int
    """Documents in the dataset."""
    tokens: int
    """Tokens in the dataset, end-of-document tokens included."""
    bytes: int
    """UTF-8 bytes of the tokenised text; 0 if nobody knows, after a repair."""
    skipped: list[Problem] = field(default_factory=list)
    """The first documents or files that were passed over."""
    skipped_count: int = 0
    """All documents and files that were passed over."""
    inputs: list[InputRecord] = field(default_factory=list)
    """The files that were read."""
    segmenter: str | None = None
    """Who marked the words of PREFIX.words; None if there is no such file."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Ending of a file (`bin`, `idx`, `words`) -> its `checksum.file_checksum`; empty if none was taken."""
    engine: str = ""
    """What encoded the text, for people; empty after a repair without a sidecar."""
    text_keys: list[str] = field(default_factory=list)
    """The keys of the text in each JSON object or row that were read; empty after a repair without a sidecar."""
    shard: str | None = None
    """Which part of the inputs this is, `3/8` for the third of eight; None for all of them."""
    format_version: int = FORMAT_VERSION
    """Version of this file's layout."""


def sidecar_path(prefix: str | Path) -> Path:
    """`PREFIX.json`."""
    return Path(f"{prefix}.json")


def write_sidecar(sidecar: Sidecar, path: Path) -> None:
    """Writes the sidecar to exactly `path`, not atomically: for a caller that renames a group of files itself."""
    # A file name that is not UTF-8 is kept as JSON escapes.
    path.write_text(json.dumps(asdict(sidecar), indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def load_sidecar(prefix: str | Path) -> Sidecar:
    """Reads `PREFIX.json`.

    Args:
        prefix: path of the dataset without ending.

    Raises:
        UserError: the file is missing, not JSON, of another format version, or a field is missing or of a wrong type.
    """
    path = sidecar_path(prefix)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; make the dataset with megatron-prealign preprocess, or, if its .bin is there, the "
            "missing files with megatron-prealign dataset repair"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({error}); mend it with megatron-prealign dataset repair"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no JSON object; make the dataset again with megatron-prealign preprocess")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}; "
            "make the dataset again with this version of megatron-prealign preprocess"
        )
    return Sidecar(
        **{
            **_typed(Sidecar, data, str(path)),
            "tokenizer": _nested(TokenizerRecord, data["tokenizer"], f"{path}: tokenizer"),
            "skipped": [_nested(Problem, item, f"{path}: skipped") for item in data["skipped"]],
            "inputs": [_nested(InputRecord, item, f"{path}: inputs") for item in data["inputs"]],
        }
    )


def _nested(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"{where}: {data!r} is not a JSON object; make the dataset again")
    return kind(**_typed(kind, data, where))


def _typed(kind: type, data: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of the dataclass `kind` out of `data`, plain ones checked for their type; unknown keys are ignored."""
    values: dict[str, Any] = {}
    for item in fields(kind):
        optional = item.type == (str | None)
        if item.name not in data:
            raise UserError(f"{where}: field {item.name!r} is missing; make the dataset again")
        value = data[item.name]
        if value is None and optional:
            values[item.name] = value
            continue
        # Field types are real classes here, as this module has no postponed annotations; generic ones are lists.
        expected: Any = item.type if item.type in (str, int, bool) else list
        if optional:
            expected = str
        elif item.type in (TokenizerRecord, dict[str, str]):
            expected = dict
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            raise UserError(
                f"{where}: field {item.name!r} is {value!r}, expected {expected.__name__}; make the dataset again"
            )
        if item.type in (dict[str, str], list[str]):
            parts = value.values() if expected is dict else value
            if not all(isinstance(part, str) for part in parts):
                raise UserError(
                    f"{where}: field {item.name!r} is {value!r}, expected only texts; make the dataset again"
                )
        values[item.name] = value
    return values

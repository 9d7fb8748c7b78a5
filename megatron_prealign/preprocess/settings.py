"""Settings of a preprocessing run and their validation."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.corpus.inputs import Input
from megatron_prealign.corpus.readers import Fields, OnError
from megatron_prealign.data.dataset import check_workers
from megatron_prealign.errors import UserError
from megatron_prealign.languages import check_language_code

SAVE_EVERY_BYTES = 256 << 20
"""Bytes of text between two saves: about a minute with a plain tokenizer on two cores, seconds with gigatoken."""
_LARGEST_DOCUMENT_LIMIT = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """Settings of a preprocessing run."""

    language: str | None = None
    """Language code of all documents; None if `fields.language_key` is set."""
    fields: Fields = Fields()
    """Keys of texts and languages in a document."""
    on_error: OnError = "stop"
    """`stop` at the first bad document or file, or `skip` it and list it in the sidecar."""
    workers: int = 1
    """Tokenising processes; 1 tokenises in this process, where a Hugging Face tokenizer uses its own threads."""
    segmenter: str | None = None
    """Segmenter for `OUTPUT.words`: a name for `segmenters.open_segmenter`, or `auto`; None writes no word bitmap."""
    shard: tuple[int, int] | None = None
    """(number from 1, count): read only one of `count` equal parts of the inputs."""
    resume: bool = False
    """Continue an unfinished run with this output, if one exists; leave a finished one unchanged."""
    overwrite: bool = False
    """Replace an existing dataset."""
    use_fast_engine: bool = True
    """Whether to use gigatoken if it supports the tokenizer and produces the same ids."""
    limits: Limits = Limits()
    """Limits that bound memory use."""
    save_every_bytes: int = SAVE_EVERY_BYTES
    """Bytes of text between two saves that a run can resume from."""


def check_settings(settings: PreprocessSettings) -> None:
    """Raises a `UserError` for settings that contradict each other or are out of range."""
    fields = settings.fields
    check_workers(settings.workers)
    if (settings.language is None) == (fields.language_key is None):
        raise UserError(
            "set either --language (a code such as en or de for all documents) or --language-key (the key of the "
            f"code in each document); got {'both' if settings.language is not None else 'neither'}"
        )
    if settings.language is not None:
        check_language_code(settings.language, "--language")
    if not fields.text_keys or len(set(fields.columns)) != len(fields.columns) or not all(fields.columns):
        raise UserError(f"--text-key is {' '.join(fields.text_keys)!r}, expected one or more different keys")
    if len(fields.texts) > 1 and "/" in "".join(fields.text_keys):
        raise UserError(
            f"--text-key is {' '.join(fields.text_keys)!r}; with several keys each becomes part of a file name and "
            "must not contain '/'; use that key alone, or set --join"
        )
    if not 1 <= settings.limits.document_bytes <= _LARGEST_DOCUMENT_LIMIT:
        raise UserError(
            f"--max-document-mb is {settings.limits.document_bytes / (1 << 20):g}, expected more than 0, at most 1024"
        )
    if settings.save_every_bytes < 1:
        raise UserError(f"--save-every-mb is {settings.save_every_bytes / (1 << 20):g}, expected more than 0")


def check_shard(shard: tuple[int, int], sources: Sequence[Input]) -> None:
    """Raises a `UserError` for an invalid shard, or inputs that cannot be sharded."""
    if not 1 <= shard[0] <= shard[1]:
        raise UserError(f"--shard is {shard[0]}/{shard[1]}, expected 1/{shard[1]} to {shard[1]}/{shard[1]}")
    for source in sources:
        if source.kind == "hub":
            raise UserError(
                f"{source.name}: cannot shard a streamed dataset: its size in bytes is unknown; download it, or omit "
                "--shard"
            )


def shard_text(shard: tuple[int, int] | None) -> str | None:
    """Shard as written to the sidecar, such as `3/8`."""
    return None if shard is None else f"{shard[0]}/{shard[1]}"

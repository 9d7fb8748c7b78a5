"""What a run of preprocessing is told, and the checks of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.corpus.inputs import Input
from megatron_prealign.corpus.readers import Fields, OnError
from megatron_prealign.data.dataset import check_workers
from megatron_prealign.errors import UserError

SAVE_EVERY_BYTES = 256 << 20
"""Text between two places to go on from: about a minute with a plain tokenizer on two cores, seconds with gigatoken."""
_LARGEST_DOCUMENT_LIMIT = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """What to read and how."""

    language: str | None = None
    """Language code of all documents; None if `fields.language_key` tells it."""
    fields: Fields = Fields()
    """Where texts and languages stand in a document."""
    on_error: OnError = "stop"
    """`stop` at the first bad document or file, or `skip` it and list it in the sidecar."""
    workers: int = 1
    """Processes that tokenise; with 1 this process does, where a Hugging Face tokenizer uses its own threads."""
    segmenter: str | None = None
    """Who marks the words in `OUTPUT.words`, a name for `segmenters.open_segmenter` or `auto`; None for nobody."""
    shard: tuple[int, int] | None = None
    """(number from 1, count): read one of `count` equal parts of the inputs only."""
    resume: bool = False
    """Go on from an unfinished run with this output, if there is one; leave a finished one as it is."""
    overwrite: bool = False
    """Replace a dataset that lies there already."""
    use_fast_engine: bool = True
    """Whether gigatoken may encode, where it takes the tokenizer and gives the same ids."""
    limits: Limits = Limits()
    """What bounds the memory."""
    save_every_bytes: int = SAVE_EVERY_BYTES
    """Bytes of text after which the work is saved, to go on from there."""


def check_settings(settings: PreprocessSettings) -> None:
    """Raises a `UserError` for settings that contradict each other or are out of range."""
    fields = settings.fields
    check_workers(settings.workers)
    if (settings.language is None) == (fields.language_key is None):
        raise UserError(
            "expected either --language, a code like en or de for all documents, or --language-key, the key under "
            f"which each tells its own; got {'both' if settings.language is not None else 'neither'}"
        )
    if settings.language is not None and not settings.language.strip():
        raise UserError("the language code is empty; expected one like en or de, as in the dictionary")
    if not fields.text_keys or len(set(fields.columns)) != len(fields.columns) or not all(fields.columns):
        raise UserError(f"--text-key is {' '.join(fields.text_keys)!r}; expected one or more different keys")
    if len(fields.texts) > 1 and "/" in "".join(fields.text_keys):
        raise UserError(
            f"--text-key is {' '.join(fields.text_keys)!r}; of several keys each becomes part of a file name, where "
            "'/' cannot stand; read that key alone, or give --join"
        )
    if not 1 <= settings.limits.document_bytes <= _LARGEST_DOCUMENT_LIMIT:
        raise UserError(
            f"--max-document-mb is {settings.limits.document_bytes / (1 << 20):g}; expected more than 0, at most 1024"
        )
    if settings.save_every_bytes < 1:
        raise UserError(f"--save-every-mb is {settings.save_every_bytes / (1 << 20):g}; expected more than 0")


def check_shard(shard: tuple[int, int], sources: Sequence[Input]) -> None:
    """Raises a `UserError` for a shard that is none, or inputs that cannot be shared out."""
    if not 1 <= shard[0] <= shard[1]:
        raise UserError(f"--shard is {shard[0]}/{shard[1]}; expected 1/{shard[1]} to {shard[1]}/{shard[1]}")
    for source in sources:
        if source.kind == "hub":
            raise UserError(
                f"{source.name}: a dataset read over the network has no bytes to share out; download it, or leave "
                "--shard out"
            )


def shard_text(shard: tuple[int, int] | None) -> str | None:
    """`3/8`, as the sidecar names it."""
    return None if shard is None else f"{shard[0]}/{shard[1]}"

"""The check that every command makes in one process before it reads the weights of a checkpoint."""

from pathlib import Path

from megatron_prealign.checkpoint.manifest import ManifestError, find_damage, read_manifest
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.progress import Progress
from megatron_prealign.recipe.checkpoint import Verify
from megatron_prealign.resources import available_cores


def check_intact(directory: Path, verify: Verify = "checksums") -> None:
    """Compares the files of a checkpoint with its manifest.

    Raises:
        UserError: it is corrupt; the corrupt files are listed.
    """
    try:
        records = read_manifest(directory)
        if verify == "sizes":
            problems = find_damage(directory, records, checksums=False)
        else:
            total = sum(record.bytes for record in records.values())
            with Progress("verify checkpoint", total, unit="B", unit_scale=True) as progress:
                problems = find_damage(
                    directory, records, checksums=True, workers=available_cores(), progress=progress.update
                )
    except ManifestError as error:
        problems = [str(error)]
    if problems:
        raise UserError(
            f"{directory} is corrupt: {shortened(problems, separator='; ')}; use another checkpoint or copy it again"
        )

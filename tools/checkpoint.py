"""`megatron-prealign checkpoint`: lists, inspects and verifies checkpoints, and exports their weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_prealign.cli.actions import Actions, run_action
from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.checkpoint import Verify
from megatron_prealign.recipe.describe import PathText
from megatron_prealign.resources import available_cores, use_huge_pages
from megatron_prealign.text import closing, command, plural, readable_bytes


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Lists checkpoints with step, size, metrics and status; the status is based on the sizes of their files.

    A star marks the checkpoint that `latest` names.
    """

    path: PathText
    """Run directory, directory of checkpoints, or one checkpoint."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Shows the metadata of a checkpoint: model, layout, run."""

    path: PathText
    """Checkpoint, or a checkpoint directory or run directory, whose newest checkpoint is used."""
    tensors: bool = False
    """List every tensor with its dtype and shape."""
    json: bool = False
    """Print JSON with all tensors instead of text."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Reads all files of a checkpoint, compares them with their checksums and lists the corrupt ones.

    Exit status 1 if a checkpoint is corrupt, or if `latest` does not name an existing one.
    """

    path: PathText
    """Checkpoint, or a checkpoint directory or run directory, whose newest checkpoint is used."""
    all: bool = False
    """Verify all checkpoints in the directory."""
    workers: int | None = None
    """Number of files read in parallel; by default, the number of CPU cores available to the process."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Exports the weights of a checkpoint, without the optimizer, for `pretrain --checkpoint.load` and `convert to-hf`.

    Needs no GPU and little memory.
    """

    checkpoint: PathText
    """Checkpoint, or a checkpoint directory or run directory, whose newest checkpoint is used."""
    output: PathText
    """Output directory."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Output dtype; by default, the dtype of the weights."""
    verify: Verify = "checksums"
    """How to verify the checkpoint first: checksums reads all files, sizes compares only their sizes."""
    overwrite: bool = False
    """Replace an existing checkpoint of weights."""


def list_(argv: Sequence[str]) -> int:
    options = parse_options(ListOptions, "checkpoint list", argv, positional="path")

    from megatron_prealign.checkpoint.commands.list import find_latest_problem, list_checkpoints, render

    directory = Path(options.path)
    listed = list_checkpoints(directory)
    if options.json:
        import json

        print(json.dumps([{**asdict(each), "status": each.status} for each in listed], ensure_ascii=False, indent=2))
        return 0
    print("\n".join(render(listed)))
    problem = find_latest_problem(directory)
    if problem:
        print(f"warning: {problem}")
    return 0


def inspect(argv: Sequence[str]) -> int:
    options = parse_options(InspectOptions, "checkpoint inspect", argv, positional="path")

    from megatron_prealign.checkpoint.commands.inspect import inspect_checkpoint, render
    from megatron_prealign.checkpoint.directory import resolve_checkpoint

    report = inspect_checkpoint(resolve_checkpoint(options.path))
    if options.json:
        import json

        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print("\n".join(render(report, options.tensors)))
    return 0


def verify(argv: Sequence[str]) -> int:
    options = parse_options(VerifyOptions, "checkpoint verify", argv, positional="path")
    workers = available_cores() if options.workers is None else options.workers
    if workers < 1:
        raise UserError(f"--workers: got {workers}, expected a number above 0")

    from megatron_prealign.checkpoint.commands.verify import (
        bytes_to_read,
        checkpoints_to_verify,
        find_latest_damage,
        verify_checkpoint,
    )
    from megatron_prealign.progress import Progress

    damage = find_latest_damage(Path(options.path))
    if damage:
        print(f"corrupt: {damage}")
    directories = checkpoints_to_verify(Path(options.path), options.all)
    corrupt = size = 0
    with Progress("verifying", bytes_to_read(directories), unit="B", unit_scale=True) as bar:
        for directory in directories:
            result = verify_checkpoint(directory, workers=workers, progress=bar.update)
            for problem in result.problems:
                print(f"corrupt: {directory}: {problem}")
            for name in result.unknown:
                print(f"extra file: {directory / name} is not in the manifest")
            if not result.problems:
                print(f"{directory}: {plural(result.files, 'file')}, {readable_bytes(result.bytes)}, all intact")
            corrupt += bool(result.problems)
            size += result.bytes
    made = f"verified {plural(len(directories), 'checkpoint')}, {readable_bytes(size)}: {corrupt or 'none'} corrupt"
    if corrupt or damage:
        print(made)
        return 1
    output = f"{directories[0].resolve().name}-huggingface"
    print(closing(made, command("convert", "to-hf", "--checkpoint", options.path, "--output", output)))
    return 0


def export_weights(argv: Sequence[str]) -> int:
    options = parse_options(ExportOptions, "checkpoint export-weights", argv)
    use_huge_pages()

    from megatron_prealign.checkpoint.commands.export import export_weights as export
    from megatron_prealign.checkpoint.directory import resolve_checkpoint
    from megatron_prealign.progress import Progress

    checkpoint = resolve_checkpoint(options.checkpoint)
    bar: Progress | None = None
    done = 0

    def show(now: int, total: int) -> None:
        nonlocal bar, done
        bar = bar or Progress("exporting", total, unit="B", unit_scale=True)
        bar.update(now - done)
        done = now

    try:
        result = export(
            checkpoint,
            Path(options.output),
            dtype=options.dtype,
            verify=options.verify,
            overwrite=options.overwrite,
            progress=show,
        )
    finally:
        if bar is not None:
            bar.close()
    output = Path(options.output)
    print(
        closing(
            f"wrote {output}: {plural(result.tensors, 'tensor')}, {plural(result.parameters, 'parameter')}, "
            f"{result.dtype}, {readable_bytes(result.bytes)}, from {checkpoint}",
            command("convert", "to-hf", "--checkpoint", output, "--output", f"{output}-huggingface"),
        )
    )
    return 0


ACTIONS: Actions = {
    "list": (list_, "list the checkpoints in a directory with steps, sizes and metrics"),
    "inspect": (inspect, "show the model, layout and run of a checkpoint"),
    "verify": (verify, "verify all files of checkpoints and list the corrupt ones"),
    "export-weights": (export_weights, "export the weights of a checkpoint without the optimizer"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `checkpoint ACTION`."""
    return run_action("checkpoint", ACTIONS, argv)

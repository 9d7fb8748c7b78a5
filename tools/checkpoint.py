"""`megatron-prealign checkpoint`: what lies in directories of checkpoints, whether it is whole, and its weights
alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_prealign.cli.actions import Actions, run_action
from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.recipe.describe import PathText
from megatron_prealign.resources import available_cores, use_huge_pages


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Lists checkpoints: steps, sizes, measures, and whether they are complete by the sizes of their files.

    The one that `latest` names has a star.
    """

    path: PathText
    """A run's directory, its directory of checkpoints, or one checkpoint."""
    json: bool = False
    """Print JSON instead."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Shows what a checkpoint says about itself: model, layout, run."""

    path: PathText
    """A checkpoint, or a directory of checkpoints or a run's directory, for its newest one."""
    tensors: bool = False
    """List every tensor with its type and shape."""
    json: bool = False
    """Print JSON instead, tensors included."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Reads a checkpoint whole, compares all its files with their checksums and names every damaged one.

    Exit status 1 if one is damaged, or missing where
    `latest` names it.
    """

    path: PathText
    """A checkpoint, or a directory of checkpoints or a run's directory, for its newest one."""
    all: bool = False
    """Every checkpoint in the directory."""
    workers: int | None = None
    """Files read at the same time; by default one for each CPU core this process may use."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Takes the weights of a checkpoint into one of their own, without the optimizer: for `pretrain --checkpoint.load`
    and `convert to-hf`. Needs no GPU and little memory."""

    checkpoint: PathText
    """A checkpoint, or a directory of checkpoints or a run's directory, for its newest one."""
    output: PathText
    """Directory to write."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Type of the weights; by default they stay as they are."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """How the checkpoint's files are checked first: read whole and compared with their checksums, or by their sizes."""
    overwrite: bool = False
    """Replace a checkpoint that is there."""


def list_(argv: Sequence[str]) -> int:
    options = parse_options(ListOptions, "checkpoint list", argv, positional="path")

    from megatron_prealign.checkpoint.commands.list import find_pointer_problem, list_checkpoints, render

    directory = Path(options.path)
    listed = list_checkpoints(directory)
    if options.json:
        import json

        print(json.dumps([{**asdict(each), "status": each.status} for each in listed], ensure_ascii=False, indent=2))
        return 0
    print("\n".join(render(listed)))
    problem = find_pointer_problem(directory)
    if problem:
        print(f"warning: {problem}")
    return 0


def inspect(argv: Sequence[str]) -> int:
    options = parse_options(InspectOptions, "checkpoint inspect", argv, positional="path")

    from megatron_prealign.checkpoint.commands.inspect import inspect_checkpoint, render
    from megatron_prealign.checkpoint.directory import resolve_checkpoint

    facts = inspect_checkpoint(resolve_checkpoint(options.path))
    if options.json:
        import json

        print(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        print("\n".join(render(facts, options.tensors)))
    return 0


def verify(argv: Sequence[str]) -> int:
    options = parse_options(VerifyOptions, "checkpoint verify", argv, positional="path")
    workers = available_cores() if options.workers is None else options.workers
    if workers < 1:
        raise UserError(f"--workers is {workers}, expected a number above 0")

    from megatron_prealign.checkpoint.commands.list import readable_bytes
    from megatron_prealign.checkpoint.commands.verify import (
        bytes_to_read,
        checkpoints_to_verify,
        find_lost,
        verify_checkpoint,
    )
    from megatron_prealign.progress import Progress

    lost = find_lost(Path(options.path))
    if lost:
        print(f"damaged: {lost}")
    directories = checkpoints_to_verify(Path(options.path), options.all)
    damaged = 0
    with Progress("verifying", bytes_to_read(directories), unit="B", unit_scale=True) as bar:
        for directory in directories:
            result = verify_checkpoint(directory, workers=workers, progress=bar.update)
            for problem in result.problems:
                print(f"damaged: {directory}: {problem}")
            for name in result.unknown:
                print(f"unknown: {directory}: {name} is not in the manifest")
            if not result.problems:
                print(f"{directory}: {result.files} files, {readable_bytes(result.bytes)}, all as they were written")
            damaged += bool(result.problems)
    if len(directories) > 1:
        print(f"{damaged} of {len(directories)} checkpoints {'is' if damaged == 1 else 'are'} damaged")
    return 1 if damaged or lost else 0


def export_weights(argv: Sequence[str]) -> int:
    options = parse_options(ExportOptions, "checkpoint export-weights", argv)
    use_huge_pages()

    from megatron_prealign.checkpoint.commands.export import check_output
    from megatron_prealign.checkpoint.commands.export import export_weights as export
    from megatron_prealign.checkpoint.commands.list import readable_bytes
    from megatron_prealign.checkpoint.directory import resolve_checkpoint
    from megatron_prealign.progress import Progress

    checkpoint = resolve_checkpoint(options.checkpoint)
    # Before hours of reading.
    check_output(checkpoint, Path(options.output), overwrite=options.overwrite)
    if options.verify == "checksums":
        _refuse_damage(checkpoint)
    bar: Progress | None = None
    done = 0

    def show(now: int, total: int) -> None:
        nonlocal bar, done
        bar = bar or Progress("exporting", total, unit="B", unit_scale=True)
        bar.update(now - done)
        done = now

    try:
        written = export(
            checkpoint, Path(options.output), dtype=options.dtype, overwrite=options.overwrite, progress=show
        )
    finally:
        if bar is not None:
            bar.close()
    print(
        f"wrote {options.output}: {written.tensors} tensors, {written.parameters:,} numbers, {written.dtype}, "
        f"{readable_bytes(written.bytes)}, from {checkpoint}"
    )
    return 0


def _refuse_damage(checkpoint: Path) -> None:
    from megatron_prealign.checkpoint.commands.verify import bytes_to_read, verify_checkpoint
    from megatron_prealign.progress import Progress

    with Progress("verifying", bytes_to_read([checkpoint]), unit="B", unit_scale=True) as bar:
        problems = verify_checkpoint(checkpoint, workers=available_cores(), progress=bar.update).problems
    if problems:
        raise UserError(f"{checkpoint} is damaged ({shortened(problems, separator='; ')}); use another checkpoint")


ACTIONS: Actions = {
    "list": (list_, "steps, sizes and measures of the checkpoints in a directory"),
    "inspect": (inspect, "model, layout and run of a checkpoint"),
    "verify": (verify, "read checkpoints whole and name every damaged file"),
    "export-weights": (export_weights, "a checkpoint of the weights alone"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `checkpoint ACTION`."""
    return run_action("checkpoint", ACTIONS, argv)

"""Code-switching of a batch on its device: the Triton kernel where it can run, else the plain-torch reference.

It is the custom op `megatron_prealign::code_switch`: torch.compile and CUDA graphs see one operation whose output
shapes depend on input shapes only. The kernel never makes the host wait for the device; the reference on a GPU does.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_prealign.kernels._triton import KernelLaunch, runs_triton
from megatron_prealign.kernels.code_switch_interface import (
    LABEL_MODES,
    LANGUAGES_FROM,
    CodeSwitchBatch,
    CodeSwitchOutput,
    CodeSwitchSettings,
    check_inputs,
)
from megatron_prealign.kernels.code_switch_reference import code_switch_reference
from megatron_prealign.kernels.ngram_table import WORD, NgramTable


@dataclass(frozen=True)
class LaunchShape:
    """Launch configuration of the kernels."""

    block: int
    """Source tokens per block, a power of two."""
    warps: int
    """Warps per program."""


# One token per thread: compiled for sm_80, sm_90 and sm_100 this takes 31 to 56 registers without spills, whereas two
# tokens per thread, or 32 warps, spill in some settings (tests/kernels/test_code_switch_compile.py). Which shape is
# fastest on a GPU has not been measured yet.
LAUNCH = LaunchShape(block=512, warps=16)

# A program that processes a complete sequence goes block by block, and each block is a chain of about ten dependent
# reads. With few or long sequences most of the device would be idle, so then each block gets its own program, at the
# cost of a second launch. The thresholds are estimates, not measured yet.
ROW_FORM_MIN_ROWS = 64
ROW_FORM_MAX_WIDTH = 8192


def launch_form(rows: int, width: int) -> str:
    """`row`: one launch, one program per sequence; `blocks`: two launches, one program per block of a sequence."""
    return "row" if rows >= ROW_FORM_MIN_ROWS and width <= ROW_FORM_MAX_WIDTH else "blocks"


def code_switch(
    batch: CodeSwitchBatch, table: NgramTable, thresholds: Tensor, settings: CodeSwitchSettings
) -> CodeSwitchOutput:
    """Switches known words of a batch into other languages; arguments and result as in `code_switch_reference`.

    On a GPU it takes one or two launches (`launch_form`). It does not wait for the device, and no allocation size
    depends on the data, so the call can be captured in a CUDA graph.

    Raises:
        ValueError: a shape, dtype, device or option is wrong.
    """
    check_inputs(batch, table, thresholds, settings)
    *outputs, document_starts, counts = _code_switch_op(
        *batch, thresholds, table.tensors, _pack_table(table), _pack_settings(settings)
    )
    return CodeSwitchOutput(*outputs, document_starts if settings.reset_at_eod else None, counts)


def _signed(value: int, bits: int) -> int:
    """Reinterprets an unsigned integer as a signed one."""
    return value - (1 << bits) if value >> (bits - 1) else value


# A custom op takes tensors and integers, so everything else is passed as two lists of integers.


def _pack_table(table: NgramTable) -> list[int]:
    return [table.draw_steps, table.counts_letters, *table.multipliers]


def _unpack_table(tensors: list[Tensor], numbers: list[int], languages: int, eod_id: int | None) -> NgramTable:
    draw_steps, counts_letters, *multipliers = numbers
    return NgramTable(
        *tensors,
        multipliers=tuple(multipliers),
        draw_steps=draw_steps,
        num_keys=len(tensors[2]) - 1,
        num_languages=languages,
        counts_letters=bool(counts_letters),
        # Checked before the call; the reference checks eod_id against these again.
        forbidden_tokens=frozenset() if eod_id is None else frozenset([eod_id]),
    )


def _pack_settings(settings: CodeSwitchSettings) -> list[int]:
    return [
        _signed(settings.seed, 64),
        settings.sequence_length,
        LABEL_MODES.index(settings.label_mode),
        settings.pad_id,
        -1 if settings.eod_id is None else settings.eod_id,
        settings.mask_eod,
        settings.reset_at_eod,
    ]


def _unpack_settings(numbers: list[int]) -> CodeSwitchSettings:
    seed, sequence_length, label_mode, pad_id, eod_id, mask_eod, reset_at_eod = numbers
    return CodeSwitchSettings(
        seed=seed % (1 << 64),
        sequence_length=sequence_length,
        label_mode=LABEL_MODES[label_mode],
        pad_id=pad_id,
        eod_id=None if eod_id < 0 else eod_id,
        mask_eod=bool(mask_eod),
        reset_at_eod=bool(reset_at_eod),
    )


def _tensors_of(output: CodeSwitchOutput) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the op, which must be tensors: an empty one if there are no document starts."""
    documents = output.document_starts
    if documents is None:
        documents = output.tokens.new_empty((0, 0), dtype=torch.int32)
    return output.tokens, output.labels, output.loss_mask, output.position_ids, documents, output.counts


@torch.library.custom_op("megatron_prealign::code_switch", mutates_args=())
def _code_switch_op(
    tokens: Tensor,
    language: Tensor,
    sample_id: Tensor,
    word_starts: Tensor | None,
    thresholds: Tensor,
    table: list[Tensor],
    table_numbers: list[int],
    settings: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    unpacked = _unpack_settings(settings)
    run = launch_code_switch if runs_triton(tokens.device) else code_switch_reference
    batch = CodeSwitchBatch(tokens, language, sample_id, word_starts)
    rebuilt = _unpack_table(table, table_numbers, len(thresholds), unpacked.eod_id)
    return _tensors_of(run(batch, rebuilt, thresholds, unpacked))


@_code_switch_op.register_fake
def _fake_code_switch(
    tokens: Tensor,
    language: Tensor,
    sample_id: Tensor,
    word_starts: Tensor | None,
    thresholds: Tensor,
    table: list[Tensor],
    table_numbers: list[int],
    settings: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _tensors_of(_empty_output(tokens, len(thresholds), _unpack_settings(settings)))


def _empty_output(tokens: Tensor, languages: int, settings: CodeSwitchSettings) -> CodeSwitchOutput:
    shape = (tokens.shape[0], settings.sequence_length)
    return CodeSwitchOutput(
        tokens=tokens.new_empty(shape, dtype=torch.int64),
        labels=tokens.new_empty(shape, dtype=torch.int64),
        loss_mask=tokens.new_empty(shape, dtype=torch.float32),
        position_ids=tokens.new_empty(shape, dtype=torch.int64),
        document_starts=tokens.new_empty(shape, dtype=torch.int32) if settings.reset_at_eod else None,
        counts=tokens.new_empty((tokens.shape[0], LANGUAGES_FROM + languages), dtype=torch.int64),
    )


def launch_code_switch(
    batch: CodeSwitchBatch,
    table: NgramTable,
    thresholds: Tensor,
    settings: CodeSwitchSettings,
    *,
    form: str | None = None,
    shape: LaunchShape | None = None,
) -> CodeSwitchOutput:
    """Launches the Triton kernels on checked inputs, as `code_switch` does on a GPU and under TRITON_INTERPRET=1.

    Args:
        form: "row" or "blocks"; None for `launch_form`.
        shape: None for LAUNCH.
    """
    form = form or launch_form(*batch.tokens.shape)
    output = _empty_output(batch.tokens, table.num_languages, settings)
    inputs = _Inputs(batch, thresholds)
    if batch.tokens.shape[0]:
        if form == "row":
            launches = _plan_row(inputs, table, settings, output, shape or LAUNCH)
        else:
            launches = _plan_blocks(inputs, table, settings, output, shape or LAUNCH)
        # Triton launches on the current device, which may differ from that of the tensors
        with torch.cuda.device_of(batch.tokens):
            for kernel, grid, arguments, options in launches:
                kernel[grid](*arguments, **options)
    return output


class _Inputs(NamedTuple):
    batch: CodeSwitchBatch
    thresholds: Tensor


def _plan_row(
    inputs: _Inputs, table: NgramTable, settings: CodeSwitchSettings, output: CodeSwitchOutput, shape: LaunchShape
) -> list[KernelLaunch]:
    """One launch, one program per sequence."""
    from megatron_prealign.kernels.code_switch_kernel import code_switch_row_kernel

    count, width = inputs.batch.tokens.shape
    eod_id, pad_id = _eod_and_pad(settings)
    arguments = (
        *_input_arguments(inputs),
        *_result_arguments(output),
        *table.tensors,
        width,
        settings.sequence_length,
        table.num_languages,
        *_lookup_scalars(table, settings),
        pad_id,
        eod_id,
    )
    options = {
        **_decide_constants(inputs, table),
        **_write_constants(settings),
        "BLOCK": min(shape.block, 1 << (width - 1).bit_length()),
        "num_warps": shape.warps,
    }
    return [KernelLaunch(code_switch_row_kernel, (count,), arguments, options)]


def _plan_blocks(
    inputs: _Inputs, table: NgramTable, settings: CodeSwitchSettings, output: CodeSwitchOutput, shape: LaunchShape
) -> list[KernelLaunch]:
    """Two launches, one program per block of a sequence."""
    from megatron_prealign.kernels.code_switch_kernel import decide_blocks_kernel, write_blocks_kernel

    tokens = inputs.batch.tokens
    count, width = tokens.shape
    blocks = -(-width // shape.block)
    decisions = tokens.new_empty((count, width), dtype=torch.int32)
    sums = tokens.new_empty((count, blocks, 2), dtype=torch.int32)
    eod_id, pad_id = _eod_and_pad(settings)
    decide_arguments = (
        *_input_arguments(inputs),
        decisions,
        sums,
        output.counts,
        *table.tensors[:-1],
        width,
        table.num_languages,
        *_lookup_scalars(table, settings),
        eod_id,
    )
    write_arguments = (
        tokens,
        decisions,
        sums,
        *_result_arguments(output),
        table.candidates,
        table.candidate_tokens,
        width,
        settings.sequence_length,
        table.num_languages,
        pad_id,
        eod_id,
    )
    common = {"BLOCK": shape.block, "num_warps": shape.warps}
    decide = {**_decide_constants(inputs, table), "RESET": settings.reset_at_eod, **common}
    write = {
        **_write_constants(settings),
        "LANGUAGES": _padded_languages(table),
        "BLOCKS": 1 << (blocks - 1).bit_length(),
        **common,
    }
    return [
        KernelLaunch(decide_blocks_kernel, (count, blocks), decide_arguments, decide),
        KernelLaunch(write_blocks_kernel, (count, blocks), write_arguments, write),
    ]


def _input_arguments(inputs: _Inputs) -> tuple[Tensor, ...]:
    tokens, language, sample_id, word_starts = inputs.batch
    starts = tokens if word_starts is None else word_starts.view(torch.uint8)
    return tokens, starts, language, sample_id, inputs.thresholds


def _result_arguments(output: CodeSwitchOutput) -> tuple[Tensor, ...]:
    # a placeholder that is neither read nor written if there are no document starts
    documents = output.counts if output.document_starts is None else output.document_starts
    return (*output[:4], documents, output.counts)


def _lookup_scalars(table: NgramTable, settings: CodeSwitchSettings) -> tuple[int, ...]:
    """Number of slots, four hash factors, and the two halves of the seed as signed integers."""
    factors = (*table.multipliers, 0, 0, 0)[:4]
    return len(table.slots), *factors, _signed(settings.seed & WORD, 32), _signed(settings.seed >> 32, 32)


def _eod_and_pad(settings: CodeSwitchSettings) -> tuple[int, int]:
    return -1 if settings.eod_id is None else settings.eod_id, settings.pad_id


def _decide_constants(inputs: _Inputs, table: NgramTable) -> dict[str, Any]:
    return {
        "COLUMNS": table.columns,
        "DRAW_STEPS": table.draw_steps,
        "LANGUAGES": _padded_languages(table),
        "COUNTS_LETTERS": table.counts_letters,
        "HAS_STARTS": inputs.batch.word_starts is not None,
    }


def _padded_languages(table: NgramTable) -> int:
    """Number of languages rounded up to a power of two, at least 8."""
    return max(8, 1 << (table.num_languages - 1).bit_length())


def _write_constants(settings: CodeSwitchSettings) -> dict[str, Any]:
    return {
        "LABEL_MODE": LABEL_MODES.index(settings.label_mode),
        "MASK_EOD": settings.mask_eod,
        "RESET": settings.reset_at_eod,
    }


def plan_launches(
    batch: CodeSwitchBatch, table: NgramTable, thresholds: Tensor, settings: CodeSwitchSettings
) -> list[KernelLaunch]:
    """All launches of both forms for these arguments, without launching: for ahead-of-time compilation."""
    output = _empty_output(batch.tokens, table.num_languages, settings)
    inputs = _Inputs(batch, thresholds)
    return [
        *_plan_row(inputs, table, settings, output, LAUNCH),
        *_plan_blocks(inputs, table, settings, output, LAUNCH),
    ]

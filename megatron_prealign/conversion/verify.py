"""Checks that a checkpoint and a Hugging Face model directory are the same model: tensor by tensor, and on a text."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.checkpoint.commit import TOKENIZER
from megatron_prealign.checkpoint.directory import resolve_checkpoint
from megatron_prealign.checkpoint.single_process.intact import check_intact
from megatron_prealign.conversion.config import huggingface_config, model_values, section_of
from megatron_prealign.conversion.hf_directory import HuggingFaceDirectory
from megatron_prealign.conversion.hidden_states import StateDifference, compare, hf_states, mcore_states
from megatron_prealign.conversion.to_hf import (
    SourceCheckpoint,
    is_imported,
    open_checkpoint,
    read_weights,
)
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress
from megatron_prealign.recipe.checkpoint import Verify
from megatron_prealign.text import plural
from megatron_prealign.tokenizer.load import load_tokenizer

DEFAULT_TEXT = """The north wind and the sun were disputing which was the stronger, when a traveller came along
wrapped in a warm cloak. 12,345 times; größer, où, ¿quién?, Солнце, 太陽, الشمس 🙂
    def f(x): return x + 1
"""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Fields that affect training or layout, not the computation.
_NOT_COMPARED = {
    "init_method_std",
    "embedding_std",
    "equal_clone_embeddings",
    "hidden_dropout",
    "attention_dropout",
    "vocab_size",
    "make_vocab_size_divisible_by",
}
_MAX_SHOWN = 20


@dataclass(frozen=True)
class TensorReport:
    """Comparison of one tensor of the model directory with the checkpoint."""

    name: str
    """Name in the directory."""
    key: str
    """Name in the checkpoint; empty if the checkpoint has no such tensor."""
    problem: str
    """Empty if the values are equal after rounding to the directory's dtype."""
    difference: float = 0.0
    """Largest absolute difference, before rounding."""


@dataclass
class VerifyReport:
    """Result of a comparison."""

    checkpoint: str
    model: str
    tolerance: float
    tensors: list[TensorReport] = field(default_factory=list)
    config: list[str] = field(default_factory=list)
    """Differences in the fields of config.json."""
    tokenizer: str = ""
    """Difference of the tokenizers on the text; empty if the ids are equal."""
    tokens: int = 0
    """Number of tokens of the text, up to the context length; 0 if the models were not run."""
    states: list[StateDifference] = field(default_factory=list)
    """Differences of the embedding, every layer, the final norm and the logits."""
    top1_agreement: float = math.nan
    """Fraction of the tokens for which both models have the same most probable next token."""

    @property
    def different_tensors(self) -> list[TensorReport]:
        return [each for each in self.tensors if each.problem]

    @property
    def first_different(self) -> str | None:
        """Name of the first state whose difference exceeds the tolerance."""
        return next((each.name for each in self.states if not each.relative <= self.tolerance), None)

    @property
    def agrees(self) -> bool:
        return not (self.different_tensors or self.config or self.tokenizer or self.first_different)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        values = asdict(self)
        values["states"] = [asdict(each) | {"relative": each.relative} for each in self.states]
        values |= {"agrees": self.agrees, "first_different": self.first_different}
        if math.isnan(self.top1_agreement):
            values["top1_agreement"] = None
        return values


def verify(
    checkpoint: str | Path,
    model: Path,
    *,
    text: str = DEFAULT_TEXT,
    tolerance: float = 1e-4,
    logits: bool = True,
    ignore_config_fields: Collection[str] = (),
    files: Verify = "checksums",
    show_progress: bool = True,
    leave_process_group: bool = False,
) -> VerifyReport:
    """Compares a checkpoint with a Hugging Face model directory.

    Memory: the largest tensor a few times; with `logits` both models in float32, one after the other.

    Args:
        checkpoint: The checkpoint, a directory of checkpoints or a run directory.
        model: The model directory.
        text: Text to run through both models, cut to the context length.
        tolerance: Tolerance of states and logits, relative to their largest value.
        logits: Whether to run the models.
        ignore_config_fields: Fields of config.json that the user declares harmless.
        files: How to verify the files of the checkpoint first.
        leave_process_group: Keep torch's process group, for callers that started it.

    Raises:
        UserError: one of them cannot be read.
    """
    resolved = resolve_checkpoint(checkpoint)
    check_intact(resolved, files)
    source = open_checkpoint(resolved)
    directory = HuggingFaceDirectory(model)
    report = VerifyReport(str(source.directory), str(model), tolerance)
    report.config = _compare_config(source, directory, ignore_config_fields)
    # Before hours of reading: the text may be empty.
    ids = _compare_tokenizers(source, model, text, report)
    report.tensors = _compare_tensors(source, directory, show_progress)
    # Models of different architectures or shapes cannot be compared layer by layer.
    if logits and not report.config and not any(each.problem and not each.difference for each in report.tensors):
        # The Megatron-Core model has no sliding window: beyond it the two differ.
        ids = ids[: min(source.seq_length, source.model.sliding_window or source.seq_length)]
        hf = hf_states(model, ids, source.model.num_layers)
        dtype, master_dtype = _dtypes(directory)
        mcore = mcore_states(source, ids, dtype, master_dtype, leave_process_group=leave_process_group)
        report.states, report.tokens = compare(mcore, hf), len(ids)
        report.top1_agreement = float((mcore["logits"].argmax(-1) == hf["logits"].argmax(-1)).float().mean())
    return report


def _dtypes(directory: HuggingFaceDirectory) -> tuple[torch.dtype, torch.dtype | None]:
    """Dtype that the checkpoint's values were rounded to, and float32 if its master weights may have been used."""
    dtypes = {_DTYPES.get(each.dtype, torch.float32) for each in directory.tensors.values()}
    if dtypes == {torch.float32}:
        return torch.float32, torch.float32
    return (dtypes.pop() if len(dtypes) == 1 else torch.float32), None


def _compare_config(source: SourceCheckpoint, directory: HuggingFaceDirectory, ignore: Collection[str]) -> list[str]:
    name = str(directory.path / "config.json")
    expected = huggingface_config(
        source.model, vocab_size=source.summary["vocab_size"], seq_length=source.seq_length, dtype="float32", eod_id=0
    )
    mcore, hf = _compared_fields(expected, name), _compared_fields(directory.config, name, ignore)
    return [
        f"{key} is {hf.get(key)!r}, expected {mcore.get(key)!r}"
        for key in sorted(mcore.keys() | hf.keys())
        if mcore.get(key) != hf.get(key)
    ] + (
        [f"vocab_size is {directory.config.get('vocab_size')}, expected {expected['vocab_size']}"]
        if directory.config.get("vocab_size") != expected["vocab_size"]
        else []
    )


def _compared_fields(config: Mapping[str, Any], name: str, ignore: Collection[str] = ()) -> dict[str, Any]:
    section = section_of(model_values(config, name, ignore=ignore))
    derived = {
        "num_query_groups": section.query_groups,
        "ffn_hidden_size": section.mlp_width,
        "kv_channels": section.head_dim,
    }
    return {key: value for key, value in {**asdict(section), **derived}.items() if key not in _NOT_COMPARED}


def _compare_tensors(
    source: SourceCheckpoint, directory: HuggingFaceDirectory, show_progress: bool
) -> list[TensorReport]:
    reports = []
    remaining = set(directory.tensors)
    _, master_dtype = _dtypes(directory)
    total = sum(each.bytes for each in directory.tensors.values())
    with Progress("compare tensors", total, unit="B", unit_scale=True, enabled=show_progress) as progress:
        for entry, tensors in read_weights(source, master_dtype):
            for name, tensor in tensors.items():
                remaining.discard(name)
                reports.append(_compare_tensor(directory, name, entry.key, tensor))
                progress.update(directory.tensors[name].bytes if name in directory.tensors else 0)
    for name in sorted(remaining):
        other = source.plan.tied.get(name)
        if other is not None:
            equal = other in directory.tensors and torch.equal(directory.read(name), directory.read(other))
            reports.append(TensorReport(name, "", "" if equal else f"differs from {other}, which it is tied to"))
        elif not source.plan.is_buffer(name):
            reports.append(TensorReport(name, "", "not in the checkpoint"))
    return reports


def _compare_tensor(directory: HuggingFaceDirectory, name: str, key: str, expected: torch.Tensor) -> TensorReport:
    stored = directory.tensors.get(name)
    if stored is None:
        return TensorReport(name, key, "missing in the model directory")
    if stored.shape != tuple(expected.shape):
        return TensorReport(name, key, f"shape {list(stored.shape)}, expected {list(expected.shape)}")
    got = directory.read(name)
    difference = float((expected.float() - got.float()).abs().max()) if got.numel() else 0.0
    if torch.equal(expected.to(got.dtype), got):
        return TensorReport(name, key, "", difference)
    if difference != difference:
        return TensorReport(name, key, "has NaN values", math.inf)
    return TensorReport(name, key, f"differs by up to {difference:.3g}", difference)


def _compare_tokenizers(source: SourceCheckpoint, model: Path, text: str, report: VerifyReport) -> list[int]:
    """Token ids of the text; a difference is added to the report."""
    from transformers import AutoTokenizer

    mcore = load_tokenizer(source.directory / TOKENIZER).encode(text)
    if not mcore:
        raise UserError("the text to compare on is empty; use a text with words")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        # Only a warning about long texts depends on it.
        tokenizer.model_max_length = 1 << 40
        # Special tokens that an imported tokenizer adds to a text are its own policy, not a difference.
        hf = list(tokenizer(text, add_special_tokens=not is_imported(source.summary)).input_ids)
    except Exception as error:  # transformers raises many types.
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        report.tokenizer = f"transformers cannot load it: {reason}"
        return mcore
    if hf != mcore:
        at = next(
            (at for at, (expected, got) in enumerate(zip(mcore, hf, strict=False)) if expected != got),
            min(len(mcore), len(hf)),
        )
        report.tokenizer = (
            f"got {plural(len(hf), 'id')}, expected {len(mcore)}; first difference at token {at}: {hf[at : at + 3]}, "
            f"expected {mcore[at : at + 3]}"
        )
    return mcore


def render(report: VerifyReport) -> list[str]:
    """The report as lines of text."""
    lines = [f"checkpoint  {report.checkpoint}", f"model       {report.model}"]
    lines += [f"config      {line}" for line in report.config] or ["config      matches"]
    different = report.different_tensors
    rounding = max((each.difference for each in report.tensors if not each.problem), default=0.0)
    suffix = f" after rounding to its dtype (by up to {rounding:.3g})" if rounding else ""
    lines.append(f"tensors     {len(report.tensors) - len(different):,} of {len(report.tensors):,} are equal{suffix}")
    lines += [f"    {each.name}: {each.problem}" for each in different[:_MAX_SHOWN]]
    if len(different) > _MAX_SHOWN:
        lines.append(f"    and {len(different) - _MAX_SHOWN} more")
    lines.append(f"tokenizer   {report.tokenizer or 'same ids on the text'}")
    if report.states:
        width = max(len(each.name) for each in report.states)
        lines.append(f"on {plural(report.tokens, 'token')}, largest difference and largest value:")
        lines += [
            f"    {each.name:<{width}}  {each.difference:.3e}  {each.scale:.3e}"
            + ("" if each.relative <= report.tolerance else "  differs")
            for each in report.states
        ]
        lines.append(f"    same most probable next token: {report.top1_agreement:.1%}")
        first = report.first_different
        lines.append(f"    first layer above the tolerance: {first or 'none'}")
    else:
        lines.append("logits      not compared")
    lines.append("the two are the same model" if report.agrees else "the two models DIFFER")
    return lines

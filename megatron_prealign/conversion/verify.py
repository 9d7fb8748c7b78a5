"""Whether a checkpoint and a directory of transformers are the same model: tensor by tensor, and on a text."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.checkpoint.commit import TOKENIZER
from megatron_prealign.checkpoint.directory import resolve_checkpoint
from megatron_prealign.conversion.both_models import Place, compare, hf_states, mcore_states
from megatron_prealign.conversion.config import huggingface_config, model_values, section_of
from megatron_prealign.conversion.hf_directory import HuggingFaceDirectory
from megatron_prealign.conversion.to_hf import (
    Source,
    came_from_huggingface,
    check_manifest,
    open_source,
    read_weights,
)
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress
from megatron_prealign.tokenizer.load import load_tokenizer

DEFAULT_TEXT = """The north wind and the sun were disputing which was the stronger, when a traveller came along
wrapped in a warm cloak. 12,345 times; größer, où, ¿quién?, Солнце, 太陽, الشمس 🙂
    def f(x): return x + 1
"""
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Fields that say how a model is trained or laid out, not what it computes.
_FREE = {"init_method_std", "hidden_dropout", "attention_dropout", "vocab_size", "make_vocab_size_divisible_by"}
_MOST_SHOWN = 20


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the directory against the checkpoint."""

    name: str
    """In the directory."""
    key: str
    """In the checkpoint; empty for one that the checkpoint has nothing for."""
    problem: str
    """Empty if the numbers are equal once rounded to the directory's type."""
    difference: float = 0.0
    """Largest, of all numbers; before anything is rounded."""


@dataclass
class VerifyReport:
    """What was found."""

    checkpoint: str
    model: str
    tolerance: float
    tensors: list[TensorReport] = field(default_factory=list)
    config: list[str] = field(default_factory=list)
    """Fields of config.json that are another model's."""
    tokenizer: str = ""
    """What differs on the text; empty if the ids are equal."""
    tokens: int = 0
    """Of the text, as far as the model can take it; 0 if the models were not compared on a text."""
    places: list[Place] = field(default_factory=list)
    """Embedding, layers, final norm, logits."""
    same_choice: float = math.nan
    """Share of the tokens for which both models find the same next token the most probable."""

    @property
    def different_tensors(self) -> list[TensorReport]:
        return [each for each in self.tensors if each.problem]

    @property
    def first_different(self) -> str | None:
        """The first place beyond the tolerance."""
        return next((each.name for each in self.places if not each.relative <= self.tolerance), None)

    @property
    def agrees(self) -> bool:
        return not (self.different_tensors or self.config or self.tokenizer or self.first_different)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        values["places"] = [asdict(each) | {"relative": each.relative} for each in self.places]
        values |= {"agrees": self.agrees, "first_different": self.first_different}
        if math.isnan(self.same_choice):
            values["same_choice"] = None
        return values


def verify(
    checkpoint: str | Path,
    model: Path,
    *,
    text: str = DEFAULT_TEXT,
    tolerance: float = 1e-4,
    logits: bool = True,
    ignore_config_fields: Collection[str] = (),
    show_progress: bool = True,
    leave_process_group: bool = False,
) -> VerifyReport:
    """Compares a checkpoint with a directory of transformers.

    Memory: the largest tensor a few times; with `logits` both models in float32, one after the other.

    Args:
        checkpoint: The checkpoint, a directory of checkpoints or a run's directory.
        model: The directory.
        text: What to run through both models; the first tokens, as many as the model can take.
        tolerance: For states and logits, against the largest number there.
        logits: Run the models at all.
        ignore_config_fields: Fields of config.json that the user vouches for.
        leave_process_group: Keep torch's process group for the caller, who started it.

    Raises:
        UserError: one of them cannot be read.
    """
    found = resolve_checkpoint(checkpoint)
    check_manifest(found, checksums=False)
    source = open_source(found)
    directory = HuggingFaceDirectory(model)
    report = VerifyReport(str(source.directory), str(model), tolerance)
    report.config = _compare_config(source, directory, ignore_config_fields)
    # Before hours of reading: the text may be of no use.
    ids = _compare_tokenizers(source, model, text, report)
    report.tensors = _compare_tensors(source, directory, show_progress)
    # Of another architecture or shape nothing could be said layer by layer.
    if logits and not report.config and not any(each.problem and not each.difference for each in report.tensors):
        # Ours has no window: beyond it the two are not the same.
        ids = ids[: min(source.seq_length, source.model.sliding_window or source.seq_length)]
        hf = hf_states(model, ids, source.model.num_layers)
        dtype, masters = _types(directory)
        mcore = mcore_states(source, ids, dtype, masters, leave_process_group=leave_process_group)
        report.places, report.tokens = compare(mcore, hf), len(ids)
        report.same_choice = float((mcore["logits"].argmax(-1) == hf["logits"].argmax(-1)).float().mean())
    return report


def _types(directory: HuggingFaceDirectory) -> tuple[torch.dtype, torch.dtype | None]:
    """To what the numbers of the checkpoint were rounded, and whether its full precision may have been taken."""
    found = {_TYPES.get(each.dtype, torch.float32) for each in directory.tensors.values()}
    if found == {torch.float32}:
        return torch.float32, torch.float32
    return (found.pop() if len(found) == 1 else torch.float32), None


def _compare_config(source: Source, directory: HuggingFaceDirectory, ignore: Collection[str]) -> list[str]:
    name = str(directory.path / "config.json")
    expected = huggingface_config(
        source.model, vocab_size=source.summary["vocab_size"], seq_length=source.seq_length, dtype="float32", eod_id=0
    )
    mcore, hf = _maths(expected, name), _maths(directory.config, name, ignore)
    return [
        f"{key} is {hf.get(key)!r}, expected {mcore.get(key)!r}"
        for key in sorted(mcore.keys() | hf.keys())
        if mcore.get(key) != hf.get(key)
    ] + (
        [f"vocab_size is {directory.config.get('vocab_size')}, expected {expected['vocab_size']}"]
        if directory.config.get("vocab_size") != expected["vocab_size"]
        else []
    )


def _maths(config: Mapping[str, Any], name: str, ignore: Collection[str] = ()) -> dict[str, Any]:
    section = section_of(model_values(config, name, ignore=ignore))
    derived = {
        "num_query_groups": section.query_groups,
        "ffn_hidden_size": section.mlp_width,
        "kv_channels": section.head_dim,
    }
    return {key: value for key, value in {**asdict(section), **derived}.items() if key not in _FREE}


def _compare_tensors(source: Source, directory: HuggingFaceDirectory, show_progress: bool) -> list[TensorReport]:
    reports = []
    left = set(directory.tensors)
    _, masters = _types(directory)
    total = sum(each.bytes for each in directory.tensors.values())
    with Progress("compare tensors", total, unit="B", unit_scale=True, enabled=show_progress) as progress:
        for entry, mcore in read_weights(source, masters):
            for name, tensor in mcore.items():
                left.discard(name)
                reports.append(_compare_tensor(directory, name, entry.key, tensor))
                progress.update(directory.tensors[name].bytes if name in directory.tensors else 0)
    for name in sorted(left):
        other = source.plan.tied.get(name)
        if other is not None:
            equal = other in directory.tensors and torch.equal(directory.read(name), directory.read(other))
            reports.append(TensorReport(name, "", "" if equal else f"differs from {other}, to which it is tied"))
        elif not source.plan.is_buffer(name):
            reports.append(TensorReport(name, "", "the checkpoint has none"))
    return reports


def _compare_tensor(directory: HuggingFaceDirectory, name: str, key: str, expected: torch.Tensor) -> TensorReport:
    stored = directory.tensors.get(name)
    if stored is None:
        return TensorReport(name, key, "missing in the directory")
    if stored.shape != tuple(expected.shape):
        return TensorReport(name, key, f"shape {list(stored.shape)}, expected {list(expected.shape)}")
    found = directory.read(name)
    difference = float((expected.float() - found.float()).abs().max()) if found.numel() else 0.0
    if torch.equal(expected.to(found.dtype), found):
        return TensorReport(name, key, "", difference)
    if difference != difference:
        return TensorReport(name, key, "has numbers that are NaN", math.inf)
    return TensorReport(name, key, f"differs by up to {difference:.3g}", difference)


def _compare_tokenizers(source: Source, model: Path, text: str, report: VerifyReport) -> list[int]:
    """The ids of the text; what differs goes into the report."""
    from transformers import AutoTokenizer

    mcore = load_tokenizer(source.directory / TOKENIZER).encode(text)
    if not mcore:
        raise UserError("the text to compare on is empty; give one with words")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        # Only a warning about long texts depends on it.
        tokenizer.model_max_length = 1 << 40
        # What a model that was not trained here puts in front of a text is its own affair.
        hf = list(tokenizer(text, add_special_tokens=not came_from_huggingface(source.summary)).input_ids)
    except Exception as error:  # transformers raises many kinds.
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        report.tokenizer = f"transformers cannot open it ({reason})"
        return mcore
    if hf != mcore:
        at = next(
            (at for at, (mine, other) in enumerate(zip(mcore, hf, strict=False)) if mine != other),
            min(len(mcore), len(hf)),
        )
        report.tokenizer = (
            f"{len(hf)} ids, expected {len(mcore)}; from token {at} on {hf[at : at + 3]}, expected {mcore[at : at + 3]}"
        )
    return mcore


def render(report: VerifyReport) -> list[str]:
    """The report for a reader."""
    lines = [f"checkpoint  {report.checkpoint}", f"model       {report.model}"]
    lines += [f"config      {line}" for line in report.config] or ["config      agrees"]
    different = report.different_tensors
    rounding = max((each.difference for each in report.tensors if not each.problem), default=0.0)
    suffix = f", once rounded to its type (by up to {rounding:.3g})" if rounding else ""
    lines.append(f"tensors     {len(report.tensors) - len(different):,} of {len(report.tensors):,} are equal{suffix}")
    lines += [f"    {each.name}: {each.problem}" for each in different[:_MOST_SHOWN]]
    if len(different) > _MOST_SHOWN:
        lines.append(f"    and {len(different) - _MOST_SHOWN} more")
    lines.append(f"tokenizer   {report.tokenizer or 'the same ids on the text'}")
    if report.places:
        width = max(len(each.name) for each in report.places)
        lines.append(f"on {report.tokens:,} tokens, the largest difference and the largest number:")
        lines += [
            f"    {each.name:<{width}}  {each.difference:.3e}  {each.scale:.3e}"
            + ("" if each.relative <= report.tolerance else "  differs")
            for each in report.places
        ]
        lines.append(f"    the same most probable next token: {report.same_choice:.1%}")
        first = report.first_different
        lines.append(f"    first layer that differs: {first or 'none'}")
    else:
        lines.append("logits      not compared")
    lines.append("the two are the same model" if report.agrees else "the two DIFFER")
    return lines

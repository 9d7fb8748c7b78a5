"""Metadata of a checkpoint, without loading its tensors."""

import math
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.commit import TOKENIZER
from megatron_prealign.checkpoint.directory import directory_bytes
from megatron_prealign.checkpoint.manifest import find_problems
from megatron_prealign.checkpoint.single_process.weights import is_vocabulary, is_weight
from megatron_prealign.checkpoint.state import is_run, read_state
from megatron_prealign.text import readable_bytes


def inspect_checkpoint(directory: Path) -> dict[str, Any]:
    """Metadata of a checkpoint, as plain values for JSON. Only the sizes of its files are checked.

    Raises:
        UserError: `state.json` or `.metadata` is corrupt.
    """
    from megatron_prealign.checkpoint.single_process.reader import ShardReader

    summary = read_state(directory)
    problems = find_problems(directory)
    with ShardReader(directory) as reader:
        tensors = {
            key: {
                "shape": list(info.shape),
                "dtype": str(info.dtype).removeprefix("torch."),
                "bytes": math.prod(info.shape) * info.dtype.itemsize,
            }
            for key, info in sorted(reader.tensors.items())
        }
    run = is_run(summary)
    report: dict[str, Any] = {
        "checkpoint": str(directory),
        "kind": "run" if run else "weights",
        "problems": problems,
        "bytes": directory_bytes(directory),
        "saved_at": summary.get("saved_at"),
        "versions": summary.get("versions"),
        "parameters": _count_parameters(tensors, summary["vocab_size"]),
        "weights": _part(tensors, True),
        "other_tensors": _part(tensors, False),
        "model": summary["model"],
        "vocab_size": summary["vocab_size"],
        "padded_vocab_size": summary["padded_vocab_size"],
        "tokenizer_fingerprint": summary["tokenizer_fingerprint"],
        "tokenizer_files": sorted(file.name for file in (directory / TOKENIZER).glob("*")),
        "layout": summary["layout"],
    }
    names = ("phase", "train_state", "metrics", "run", "consumed_samples_per_source", "blend") if run else ("source",)
    return {**report, **{name: summary.get(name) for name in names}, "tensors": tensors}


def render(report: dict[str, Any], tensors: bool) -> list[str]:
    """Human-readable lines of the result of `inspect_checkpoint`.

    Args:
        tensors: List every tensor.
    """
    lines = [f"{report['checkpoint']}: {'corrupt' if report['problems'] else 'complete'}"]
    lines += [f"  problem: {problem}" for problem in report["problems"]]
    rows = {
        "kind": "run" if report["kind"] == "run" else "weights only",
        "saved": report["saved_at"],
        "size": f"{readable_bytes(report['bytes'])}, weights {readable_bytes(report['weights']['bytes'])}",
        "parameters": f"{report['parameters']:,} ({report['weights']['dtype']})",
        "model": _model_line(report["model"]),
        "vocabulary": f"{report['vocab_size']:,} ids, padded to {report['padded_vocab_size']:,}",
        "tokenizer": ", ".join(report["tokenizer_files"]) or "none",
        "layout": _layout_line(report["layout"]),
        "versions": _plain(report["versions"]),
        **(_run_rows(report) if report["kind"] == "run" else {"source": _plain(report["source"])}),
    }
    lines += [f"{name:<12}  {text}" for name, text in rows.items() if text]
    if tensors:
        width = max((len(name) for name in report["tensors"]), default=0)
        lines += [f"{name:<{width}}  {each['dtype']:<9} {each['shape']}" for name, each in report["tensors"].items()]
    return lines


def _count_parameters(tensors: dict[str, Any], vocab_size: int) -> int:
    """Number of parameters of the model, without padding rows of the vocabulary."""
    count = 0
    for key, tensor in tensors.items():
        if is_weight(key):
            rows = min(vocab_size, tensor["shape"][0]) if is_vocabulary(key) else None
            count += math.prod(tensor["shape"]) if rows is None else rows * math.prod(tensor["shape"][1:])
    return count


def _part(tensors: dict[str, Any], weights: bool) -> dict[str, Any]:
    """Number, bytes and dtype of the model weights, or of all other tensors."""
    selected = [tensor for key, tensor in tensors.items() if is_weight(key) is weights]
    return {
        "tensors": len(selected),
        "bytes": sum(tensor["bytes"] for tensor in selected),
        "dtype": " and ".join(sorted({tensor["dtype"] for tensor in selected})),
    }


def _model_line(model: dict[str, Any]) -> str:
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
    shape = ", ".join(f"{name} {model[name]}" for name in names if model.get(name) is not None)
    tied = ", tied embeddings" if model.get("share_embeddings_and_output_weights") else ""
    return f"{model.get('family', '?')}: {shape}{tied}"


def _layout_line(layout: dict[str, Any]) -> str:
    names = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "data": "DP"}
    sizes = {
        short: layout.get(f"{name}_model_parallel_size" if name != "data" else "data_parallel_size")
        for name, short in names.items()
    }
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)


def _run_rows(report: dict[str, Any]) -> dict[str, str]:
    state, run = report["train_state"], report["run"]
    consumed = report["consumed_samples_per_source"]
    sources = run.get("sources") if isinstance(run.get("sources"), list) else []
    return {
        "step": f"{state.get('step', '?')}, phase {report['phase']} (step {state.get('phase_step', '?')} of the phase)",
        "tokens": f"{state.get('tokens', '?'):,}" if isinstance(state.get("tokens"), int) else "?",
        "training": f"seq_length {run.get('seq_length')}, {run.get('precision')}, seed {run.get('seed')}",
        "metrics": _plain(report["metrics"]),
        "data": "; ".join(
            f"{source.get('path')} ({source.get('language')}) x {source.get('weight')}"
            for source in sources
            if isinstance(source, dict)
        ),
        "consumed": _plain(consumed),
    }


def _plain(values: Any) -> str:
    """Names and values in one line, without nested tables and lists; empty if there are none."""
    if not isinstance(values, dict):
        return "" if values is None else str(values)
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if value is not None and not isinstance(value, dict | list)
    )

"""Everything that a checkpoint says about itself, without loading its tensors."""

import math
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.commands.list import directory_bytes, readable_bytes
from megatron_prealign.checkpoint.commit import TOKENIZER
from megatron_prealign.checkpoint.manifest import find_problems
from megatron_prealign.checkpoint.single_process.weights import is_vocabulary, is_weight
from megatron_prealign.checkpoint.state import is_run, read_state


def inspect_checkpoint(directory: Path) -> dict[str, Any]:
    """The facts, as plain values for JSON. Files are compared by their sizes alone.

    Raises:
        UserError: its state.json or its `.metadata` is damaged.
    """
    from megatron_prealign.checkpoint.single_process.reader import ShardReader

    summary = read_state(directory)
    problems = find_problems(directory)
    with ShardReader(directory) as reader:
        tensors = {
            key: {
                "shape": list(facts.shape),
                "dtype": str(facts.dtype).removeprefix("torch."),
                "bytes": math.prod(facts.shape) * facts.dtype.itemsize,
            }
            for key, facts in sorted(reader.tensors.items())
        }
    run = is_run(summary)
    facts: dict[str, Any] = {
        "checkpoint": str(directory),
        "kind": "run" if run else "weights",
        "problems": problems,
        "bytes": directory_bytes(directory),
        "saved_at": summary.get("saved_at"),
        "versions": summary.get("versions"),
        "parameters": _count_parameters(tensors, summary["vocab_size"]),
        "weights": _part(tensors, True),
        "beside_the_weights": _part(tensors, False),
        "model": summary["model"],
        "vocab_size": summary["vocab_size"],
        "padded_vocab_size": summary["padded_vocab_size"],
        "tokenizer_fingerprint": summary["tokenizer_fingerprint"],
        "tokenizer_files": sorted(file.name for file in (directory / TOKENIZER).glob("*")),
        "layout": summary["layout"],
    }
    names = ("phase", "train_state", "metrics", "run", "consumed_samples_per_source", "blend") if run else ("source",)
    return {**facts, **{name: summary.get(name) for name in names}, "tensors": tensors}


def render(facts: dict[str, Any], tensors: bool) -> list[str]:
    """What a person wants to know of `inspect_checkpoint`'s facts, a line each.

    Args:
        tensors: List every tensor.
    """
    lines = [f"{facts['checkpoint']}: {'damaged' if facts['problems'] else 'complete'}"]
    lines += [f"  wrong: {problem}" for problem in facts["problems"]]
    rows = {
        "kind": "of a run" if facts["kind"] == "run" else "weights alone",
        "saved": facts["saved_at"],
        "size": f"{readable_bytes(facts['bytes'])}, weights {readable_bytes(facts['weights']['bytes'])}",
        "parameters": f"{facts['parameters']:,} ({facts['weights']['dtype']})",
        "model": _model_line(facts["model"]),
        "vocabulary": f"{facts['vocab_size']:,} ids, padded to {facts['padded_vocab_size']:,}",
        "tokenizer": ", ".join(facts["tokenizer_files"]) or "none",
        "layout": _layout_line(facts["layout"]),
        "versions": _plain(facts["versions"]),
        **(_run_rows(facts) if facts["kind"] == "run" else {"source": _plain(facts["source"])}),
    }
    lines += [f"{name:<12}  {text}" for name, text in rows.items() if text]
    if tensors:
        width = max((len(name) for name in facts["tensors"]), default=0)
        lines += [f"{name:<{width}}  {each['dtype']:<9} {each['shape']}" for name, each in facts["tensors"].items()]
    return lines


def _count_parameters(tensors: dict[str, Any], vocab_size: int) -> int:
    """Numbers of the model, without rows that only pad the vocabulary."""
    count = 0
    for key, facts in tensors.items():
        if is_weight(key):
            rows = min(vocab_size, facts["shape"][0]) if is_vocabulary(key) else None
            count += math.prod(facts["shape"]) if rows is None else rows * math.prod(facts["shape"][1:])
    return count


def _part(tensors: dict[str, Any], weights: bool) -> dict[str, Any]:
    chosen = [facts for key, facts in tensors.items() if is_weight(key) is weights]
    return {
        "tensors": len(chosen),
        "bytes": sum(facts["bytes"] for facts in chosen),
        "dtype": " and ".join(sorted({facts["dtype"] for facts in chosen})),
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


def _run_rows(facts: dict[str, Any]) -> dict[str, str]:
    state, run = facts["train_state"], facts["run"]
    consumed = facts["consumed_samples_per_source"]
    sources = run.get("sources") if isinstance(run.get("sources"), list) else []
    return {
        "step": f"{state.get('step', '?')}, phase {facts['phase']} (step {state.get('phase_step', '?')} of it)",
        "tokens": f"{state.get('tokens', '?'):,}" if isinstance(state.get("tokens"), int) else "?",
        "training": f"seq_length {run.get('seq_length')}, {run.get('precision')}, seed {run.get('seed')}",
        "measures": _plain(facts["metrics"]),
        "data": "; ".join(
            f"{source.get('path')} ({source.get('language')}) x {source.get('weight')}"
            for source in sources
            if isinstance(source, dict)
        ),
        "consumed": _plain(consumed),
    }


def _plain(values: Any) -> str:
    """Names and values in a line, tables and lists among the values aside; empty if there are none."""
    if not isinstance(values, dict):
        return "" if values is None else str(values)
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if value is not None and not isinstance(value, dict | list)
    )

"""Model card: what the checkpoint and its run say about the model, for later users of the directory."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_prealign import __version__
from megatron_prealign.checkpoint.commit import RECIPE_FILE
from megatron_prealign.checkpoint.state import SHUFFLED_DICTIONARY, is_control, is_run
from megatron_prealign.conversion.families import FAMILIES
from megatron_prealign.files.yaml_text import load_yaml, read_utf8
from megatron_prealign.recipe import ModelSection
from megatron_prealign.recipe.phases import ALIGNMENT

if TYPE_CHECKING:
    from megatron_prealign.conversion.to_hf import ConvertResult
    from megatron_prealign.conversion.tokenizer import TokenizerExport

_LANGUAGE = re.compile(r"[a-z]{2,3}")
_RATIO = {
    "occurrences": "the probability that an occurrence of a dictionary word was replaced by a translation",
    "words": "the fraction of all running words that was replaced by translations",
}
"""Meaning of code_switch.ratio for each code_switch.ratio_of."""
_MAX_EVALUATIONS = 12


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the run."""

    phase: str
    step: int
    tokens: int
    validation_loss: Mapping[str, float]
    """Nats per token, by language."""
    retrieval: Mapping[str, float]
    """Pair of languages -> word retrieval P@1, mean over the layers."""


@dataclass(frozen=True)
class History:
    """Metrics of the run, up to the step of the checkpoint."""

    evaluations: Sequence[Evaluation] = field(default_factory=list)
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Phase -> first and last logged training loss."""


def model_card(
    name: str,
    checkpoint: Path,
    summary: Mapping[str, Any],
    model: ModelSection,
    seq_length: int,
    result: "ConvertResult",
    tokenizer: "TokenizerExport",
    history: History | None,
) -> str:
    """Content of README.md. The same checkpoint gives the same text."""
    info = {**summary, **({"source": {}} if is_run(summary) else summary["source"])}
    parts = [
        _front_matter(info),
        f"# {_one_line(name)}\n",
        _introduction(info, result),
        _usage(tokenizer),
        _architecture(summary, model, seq_length, result),
        _training(checkpoint, info),
        _data(info, seq_length),
        _metrics(info, history),
        _tokenizer(tokenizer, result),
        _versions(info),
        "## Licence\n\nNot specified: it depends on the licence of the data and on who trained the model. Add it here, "
        "and as `license` at the top of this file.\n",
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(info: Mapping[str, Any]) -> str:
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    languages = sorted({source["language"] for source in _sources(info)})
    known = [language for language in languages if _LANGUAGE.fullmatch(language)]
    if known:
        content["language"] = known
    content["tags"] = ["megatron-prealign"]
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def _introduction(info: Mapping[str, Any], result: "ConvertResult") -> str:
    phases = (info.get("run") or {}).get("phases") or []
    text = "A causal language model"
    if ALIGNMENT in phases and len(phases) > 1:
        text += (
            " whose word representations were aligned across languages by a bilingual dictionary before pretraining "
            "(the PreAlign method, arXiv:2407.16222)"
        )
    if (info.get("run") or {}).get("code_switch"):
        text += (
            ", pretrained with code-switching: words of the input that a bilingual dictionary contains were replaced "
            "at random by their translations"
        )
    if is_control(info.get("run") or {}):
        text += (
            ". It is a control for comparisons: its dictionary was shuffled, so that every word had the translations "
            "of another word"
        )
    elif shuffled := (info.get("run") or {}).get(SHUFFLED_DICTIONARY):
        text += f". Its dictionary had noise: {shuffled['share']:.0%} of the words had the translations of another word"
    precision = f"The weights are {result.dtype}"
    if result.from_master_weights:
        precision += ", from the optimizer's fp32 master weights"
    return f"{text}. Exported by megatron-prealign {__version__}. {precision}.\n"


def _usage(tokenizer: "TokenizerExport") -> str:
    policy = (
        f"Documents in training ended with\n`{tokenizer.eod_token}` (id {tokenizer.eod_id}), which is the `eos_token` "
        "and, because it precedes the next document,\nalso the `bos_token`. No special tokens are added to a text "
        "automatically."
        if tokenizer.converted
        else f"A document ends with\n`{tokenizer.eod_token}` (id {tokenizer.eod_id}). Special tokens at the start of a "
        "text follow the tokenizer's own policy."
    )
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

{policy}
"""


def _architecture(summary: Mapping[str, Any], model: ModelSection, seq_length: int, result: "ConvertResult") -> str:
    rows = [
        ("architecture", FAMILIES[model.family].title),
        ("parameters", f"{result.parameters:,}"),
        ("layers", f"{model.num_layers:,}"),
        ("hidden size", f"{model.hidden_size:,}"),
        ("MLP hidden size", f"{model.mlp_width:,}"),
        ("attention heads", f"{model.num_attention_heads} ({model.query_groups} key/value heads)"),
        ("context length", f"{seq_length:,} tokens"),
        ("vocabulary", f"{summary['vocab_size']:,} ids"),
        ("tied embeddings", "yes" if model.share_embeddings_and_output_weights else "no"),
    ]
    if model.rope_scaling is not None:
        rows.append(("rotary scaling", model.rope_scaling.rope_type))
    return "## Model\n\n" + _table(("", ""), rows)


def _training(checkpoint: Path, info: Mapping[str, Any]) -> str:
    state = info.get("train_state") or info
    run = info.get("run") or {}
    rows = [
        ("checkpoint", checkpoint.name),
        ("step", _count(state.get("step"))),
        ("tokens seen", _count(state.get("tokens"))),
        ("phase", info.get("phase")),
        ("phases of the run", ", ".join(run.get("phases") or [])),
        ("precision", run.get("precision")),
        ("sequence length", _count(run.get("seq_length"))),
        ("seed", run.get("seed")),
        ("saved", info.get("saved_at")),
        ("imported from", _origin(info)),
    ]
    text = "## Training\n\n" + _table(("", ""), [(name, value) for name, value in rows if value not in (None, "")])
    switching = (run.get("switching") or {}).get("settings") or {}
    if switching:
        shown = ("ratio", "ratio_of", "label_mode", "schedule", "final_ratio")
        settings = {name: switching[name] for name in shown if switching.get(name) is not None}
        text += f"\nCode-switching: `{json.dumps(settings)}`."
        meaning = _RATIO.get(str(settings.get("ratio_of")))
        text += f" `ratio` is {meaning}.\n" if meaning else "\n"
    return text + _recipe(checkpoint)


def _origin(info: Mapping[str, Any]) -> str | None:
    """Name of the directory that the weights were imported from, if they were not trained here."""
    source = info["source"]
    return _one_line(Path(str(source.get("model"))).name) if source.get("format") == "huggingface" else None


def _recipe(checkpoint: Path) -> str:
    """The sections of the recipe that describe the training, without paths of the machine."""
    try:
        recipe = load_yaml(read_utf8(checkpoint / RECIPE_FILE))
    except (OSError, ValueError):
        return ""
    shown = {
        name: {key: value for key, value in recipe[name].items() if value is not None}
        for name in ("alignment", "alignment_guard", "optimizer", "training")
        if isinstance(recipe, dict) and isinstance(recipe.get(name), dict)
    }
    if not shown:
        return ""
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    return f"\n<details><summary>Recipe</summary>\n\n```yaml\n{text}```\n\n</details>\n"


def _sources(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    sources = (info.get("run") or {}).get("sources") or info.get("sources") or []
    return [source for source in sources if isinstance(source, dict) and isinstance(source.get("language"), str)]


def _data(info: Mapping[str, Any], seq_length: int) -> str:
    sources = _sources(info)
    if not sources:
        return ""
    consumed = info.get("consumed_samples_per_source") or {}
    length = (info.get("run") or {}).get("seq_length") or seq_length
    total = sum(float(source.get("weight") or 0) for source in sources) or 1.0
    rows = []
    for source in sources:
        path = str(source.get("path", ""))
        samples = consumed.get(path)
        seen = f"{samples * length:,}" if isinstance(samples, int) else ""
        share = f"{float(source.get('weight') or 0) / total:.1%}"
        rows.append((_one_line(Path(path).name), source["language"], share, seen))
    more = len(rows) - 200
    table = _table(("source", "language", "share", "tokens seen"), rows[:200])
    return f"## Data\n\n{table}" + (f"\nand {more} more sources\n" if more > 0 else "")


def _metrics(info: Mapping[str, Any], history: History | None) -> str:
    metrics = {name: value for name, value in (info.get("metrics") or {}).items() if isinstance(value, int | float)}
    parts = []
    if metrics:
        rows = []
        for name, value in sorted(metrics.items()):
            loss = name.startswith("validation_loss") and 0 <= value < 50
            rows.append((f"`{name}`", f"{value:.4f}" + (f" (perplexity {math.exp(value):,.1f})" if loss else "")))
        parts.append("At this checkpoint:\n\n" + _table(("metric", ""), rows))
    if history is not None and history.evaluations:
        parts.append(_evaluations(history.evaluations))
    if history is not None and history.losses:
        losses = [(phase, f"{first:.4f}", f"{last:.4f}") for phase, (first, last) in history.losses.items()]
        parts.append(_table(("phase", "first training loss", "last"), losses))
    if not parts:
        return ""
    return (
        "## Metrics\n\nLosses are in nats per token of this tokenizer. Word and sentence retrieval (P@1) is the "
        "fraction of words or sentences whose nearest neighbour is their translation, averaged over the layers.\n\n"
    ) + "\n".join(parts)


def _evaluations(evaluations: Sequence[Evaluation]) -> str:
    losses = sorted({language for each in evaluations for language in each.validation_loss})
    pairs = sorted({pair for each in evaluations for pair in each.retrieval})
    step = max(1, math.ceil(len(evaluations) / _MAX_EVALUATIONS))
    # The last evaluation is always included.
    chosen = list(reversed(list(reversed(evaluations))[::step]))
    rows = [
        (
            each.phase,
            f"{each.step:,}",
            f"{each.tokens:,}",
            *(
                f"{each.validation_loss[language]:.3f}" if language in each.validation_loss else ""
                for language in losses
            ),
            *(f"{each.retrieval[pair]:.3f}" if pair in each.retrieval else "" for pair in pairs),
        )
        for each in chosen
    ]
    header = ("phase", "step", "tokens", *(f"loss {name}" for name in losses), *(f"P@1 {name}" for name in pairs))
    return _table(header, rows)


def _tokenizer(tokenizer: "TokenizerExport", result: "ConvertResult") -> str:
    notes = "".join(f"- {note}\n" for note in result.notes)
    return f"## Tokenizer\n\nSource: {tokenizer.kind}.\n" + (f"\n{notes}" if notes else "")


def _versions(info: Mapping[str, Any]) -> str:
    versions = info.get("versions") or {}
    rows = [(name, value) for name, value in versions.items() if name != "machine"]
    return "## Versions\n\nSoftware used for training.\n\n" + _table(("", ""), rows) if rows else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _count(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _one_line(text: str) -> str:
    """The text without line breaks, which would break a table or a title."""
    return " ".join(text.split())

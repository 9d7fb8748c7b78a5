"""A small valid recipe as plain values, modified by the tests of recipes."""

import copy
from pathlib import Path
from typing import Any

import yaml

_VALUES: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2},
    "data": {"tokenizer": "tok", "seq_length": 16, "sources": [{"path": "en", "language": "en"}]},
    "optimizer": {"lr": 0.001},
    "training": {"seed": 1, "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 3},
    "logging": {"run_dir": "run"},
    "dictionary": {"table": "table.safetensors"},
    "alignment": {"train_iters": 5, "words_per_step": 32, "lr": 0.001, "lm_global_batch_size": 4},
    "code_switch": {"ratio": 0.05},
}


def recipe_values(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the values with changes; a key is a dotted path, and None removes the field or section."""
    values = copy.deepcopy(_VALUES)
    for name, value in (changes or {}).items():
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        if value is None:
            section.pop(last, None)
        else:
            section[last] = value
    return values


def write_recipe(directory: Path, changes: dict[str, Any] | None = None, name: str = "recipe.yaml") -> str:
    """Writes the values with changes as YAML; returns the path."""
    path = directory / name
    path.write_text(yaml.safe_dump(recipe_values(changes), sort_keys=False), encoding="utf-8")
    return str(path)

"""Trains models for a few steps with the real trainer in any layout; the functions run in workers."""

from pathlib import Path
from typing import Any

from support.tiny import Tiny, recipe_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
# Learning rate at which a step changes no weight: updates are less than half a unit in the last place of any non-zero
# weight.
NO_UPDATE_LR = 1e-30


def recipe_values(tiny: Tiny, run_dir: Path, family: str, **sections: dict[str, Any]) -> dict[str, Any]:
    values = tiny.values(run_dir)
    for name in ("alignment", "code_switch", "dictionary"):
        del values[name]
    values["model"] |= {
        "family": family,
        "ffn_hidden_size": 48,
        "num_query_groups": 4 if family == "gpt2" else 2,
        "share_embeddings_and_output_weights": family in ("gpt2", "qwen3"),
        **({"sliding_window": 32} if family == "mistral" else {}),
        **(
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 8}}
            if family == "llama"
            else {}
        ),
    }
    values["training"] |= {"train_iters": 2}
    values["optimizer"] |= {"lr_warmup_iters": 0}
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return values


def train(values: dict[str, Any], directory: str) -> None:
    """Runs in a worker."""
    from megatron_prealign.run.pretrain import pretrain

    pretrain(recipe_of(values, Path(directory)), leave_process_group=True)


def verify(checkpoint: str, model: str, options: dict[str, Any]) -> Any:
    """Runs in a worker."""
    from megatron_prealign.conversion.verify import verify as compare

    return compare(checkpoint, Path(model), show_progress=False, leave_process_group=True, **options)

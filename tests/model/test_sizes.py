"""Numbers of parameters computed from the recipe are those of the built model."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.model_builds import SEQ_LENGTH, VOCAB_SIZE, recipe_values
from support.tiny import recipe_of
from support.workers import WorkerPool

from megatron_prealign.model.sizes import count_model_parameters, count_stage_parameters, padded_vocab_size
from megatron_prealign.recipe import ModelSection, ParallelSection

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
# Section parallel, and changes of section model.
LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"tensor_model_parallel_size": 2}, {"make_vocab_size_divisible_by": 24}),
    ({"pipeline_model_parallel_size": 2}, {"share_embeddings_and_output_weights": True}),
    ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {"num_layers": 4}),
]


def built_parameters(layouts: list[list[dict[str, Any]]]) -> list[int]:
    """Runs in workers: number of parameters of this process, for every recipe. Recipes of a list have one layout, whose
    process groups take longer to make than the models."""
    from megatron.core import parallel_state

    from megatron_prealign.model.build import build_model
    from megatron_prealign.runtime.distributed import start

    counts = []
    for cases in layouts:
        with tempfile.TemporaryDirectory() as directory:
            recipes = [recipe_of(values, Path(directory)) for values in cases]
        runtime = start(recipes[0].parallel, seed=1)
        models = [build_model(recipe, runtime, vocab_size=VOCAB_SIZE) for recipe in recipes]
        counts += [sum(each.numel() for chunk in chunks for each in chunk.parameters()) for chunks in models]
        parallel_state.destroy_model_parallel()
    return counts


def sizes_of(values: dict[str, Any]) -> tuple[int, list[int]]:
    """Computed number of parameters of the model, and of a process of each stage."""
    model, parallel = ModelSection(**values["model"]), ParallelSection(**values["parallel"])
    padded = padded_vocab_size(VOCAB_SIZE, model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size)
    total = count_model_parameters(model, padded_vocab_size=padded, seq_length=SEQ_LENGTH)
    return total, count_stage_parameters(model, parallel, padded_vocab_size=padded, seq_length=SEQ_LENGTH)


def test_one_process_has_the_computed_parameters(workers: WorkerPool) -> None:
    changes: list[dict[str, Any]] = [
        {"num_layers": 3},
        {"num_layers": 2, "share_embeddings_and_output_weights": True},
        {"num_layers": 1, "ffn_hidden_size": None, "max_position_embeddings": 30, "make_vocab_size_divisible_by": 128},
    ]
    cases = [recipe_values(family, change) for family in FAMILIES for change in changes]
    # Heads wider than hidden_size / num_attention_heads.
    cases += [recipe_values(family, {"num_layers": 1, "kv_channels": 24}) for family in ("llama", "qwen3")]
    (built,) = workers.run(1, built_parameters, [cases])
    computed = [sizes_of(values) for values in cases]
    assert built == [total for total, _ in computed]
    assert [[count] for count in built] == [stages for _, stages in computed]


@pytest.mark.slow
def test_processes_of_a_layout_have_the_computed_parameters(workers: WorkerPool) -> None:
    layouts = [
        [recipe_values(family, {"num_layers": 2, **model}, parallel=parallel) for family in FAMILIES]
        for parallel, model in LAYOUTS
    ]
    first, second = workers.run(2, built_parameters, layouts)
    for values, *built in zip([values for cases in layouts for values in cases], first, second, strict=True):
        _, stages = sizes_of(values)
        # Tensor-parallel ranks are in the same stage.
        assert built == (stages if len(stages) == 2 else stages * 2), values["model"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_total_does_not_count_copies(tied: bool) -> None:
    """A tied embedding is copied to the last stage, which the total does not depend on."""
    values = recipe_values("llama", {"share_embeddings_and_output_weights": tied})
    total, (alone,) = sizes_of(values)
    values["parallel"]["pipeline_model_parallel_size"] = 2
    same_total, stages = sizes_of(values)
    copy = sum(stages) - total
    assert total == same_total == alone
    assert copy == (48 * 32 if tied else 0)

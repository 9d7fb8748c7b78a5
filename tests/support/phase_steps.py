"""Helpers for tests of single steps: phases as built by `pretrain`, and the gradients of one step."""

from pathlib import Path
from typing import Any

import torch

from support.model_builds import perturb
from support.tiny import recipe_of


def open_run(values: dict[str, Any], directory: str) -> tuple[Any, Any, Any, Any, Any]:
    """Recipe, runtime, inputs, phases and wrapped chunks as built by `pretrain`, with random values for all
    parameters."""
    from megatron_prealign.model.build import build_model
    from megatron_prealign.run.inputs import open_inputs
    from megatron_prealign.run.pretrain import build_phases, build_word_steps
    from megatron_prealign.runtime.distributed import start
    from megatron_prealign.runtime.engine import wrap_data_parallel

    recipe = recipe_of(values, Path(directory))
    runtime = start(recipe.parallel, seed=recipe.training.seed)
    inputs = open_inputs(recipe)
    models = build_model(recipe, runtime, vocab_size=inputs.vocabulary.size)
    for model in models:
        perturb(model)
    chunks = wrap_data_parallel(models, recipe.parallel)
    words = build_word_steps(recipe, runtime, inputs.dictionary)
    return recipe, runtime, inputs, build_phases(recipe, runtime, inputs, words), chunks


def step(phase: Any, state: Any, chunks: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Runs one step; returns the gradients of this process, by chunk and name, and the metrics."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    phase.begin(state, chunks)
    phase.forward_backward(state, chunks)
    phase.end()
    gradients = {
        f"{index}.{name}" if len(chunks) > 1 else name: each.main_grad.clone()
        for index, chunk in enumerate(chunks)
        for name, each in chunk.module.named_parameters()
    }
    return gradients, phase.metrics(1)

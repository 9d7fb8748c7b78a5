"""The optimizer's state is saved without a gather: the same tensors that Megatron-Core saves after gathering them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import Tiny, recipe_of
from support.whole_runs import everything_in, language_model_values, run
from support.workers import WorkerPool


def train_with_gathered_state(values: dict[str, Any], directory: str) -> None:
    """Runs in workers: the optimizer's state is saved in Megatron-Core's own way."""
    from megatron_prealign.checkpoint import store
    from megatron_prealign.checkpoint.sharded.optimizer_state import OPTIMIZER_METADATA
    from megatron_prealign.run.pretrain import pretrain

    real = store.optimizer_state
    store.optimizer_state = lambda optimizer, model: optimizer.sharded_state_dict(model, metadata=OPTIMIZER_METADATA)
    try:
        pretrain(recipe_of(values, Path(directory)), leave_process_group=True)
    finally:
        store.optimizer_state = real


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "parallel", "model", "precision"),
    [
        (2, {}, {}, "bf16"),
        (
            4,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            {"family": "gpt2", "num_query_groups": None},
            "fp32",
        ),
        (4, {"pipeline_model_parallel_size": 2}, {"share_embeddings_and_output_weights": True}, "fp32"),
    ],
)
def test_state_saved_without_a_gather_is_complete(
    workers: WorkerPool,
    tiny: Tiny,
    tmp_path: Path,
    world_size: int,
    parallel: dict[str, Any],
    model: dict[str, Any],
    precision: str,
) -> None:
    saved = []
    for name in ("own", "gathered"):
        values = language_model_values(tiny, tmp_path / name)
        values["parallel"] |= parallel
        values["model"] |= model
        values["training"] |= {"train_iters": 2, "precision": precision}
        if name == "own":
            run(workers, world_size, values, tmp_path / name)
        else:
            workers.run(world_size, train_with_gathered_state, values, str(tmp_path / name))
        checkpoint = tmp_path / name / "checkpoints" / "step_00000002"
        saved.append(workers.run(1, everything_in, str(checkpoint))[0])
    own, gathered = saved
    assert own.keys() == gathered.keys()
    moments = [key for key in own if key.startswith("optimizer.state.exp_avg_sq.")]
    assert len(moments) > 5
    assert all(own[key].abs().max() > 0 for key in moments)
    for key, tensor in gathered.items():
        assert torch.equal(own[key], tensor), key

"""Projection heads, one per aligned layer: the contrastive loss is computed on their outputs instead of the states.

A head is two linear layers with a ReLU between them, as in Gaschi et al. (Findings of ACL 2023, arXiv 2306.02790).
Heads are not part of the model: the phase trains them alongside it and nothing uses them later. Each rank has full
replicas of the heads of its pipeline stage, since they process only its own words, a small part of a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel

from megatron_prealign.alignment.taps import layer_modules
from megatron_prealign.runtime.adam import FusedAdamW
from megatron_prealign.runtime.distributed import Runtime


class ProjectionHeads:
    """The float32 heads of this pipeline stage and their Adam optimizer."""

    def __init__(
        self,
        models: Sequence[GPTModel],
        runtime: Runtime,
        *,
        layer_weights: Sequence[float],
        size: int,
        lr: float,
        clip_grad: float,
        seed: int,
    ) -> None:
        """
        Args:
            layer_weights: one per layer, numbered as in the taps; layers with weight 0 have no head.
            size: output dimension.
        """
        self._runtime = runtime
        self._clip_grad = clip_grad
        hidden = models[0].config.hidden_size
        here = [layer for model in models for layer in layer_modules(model, len(layer_weights) - 2)]
        layers = [layer for layer in here if layer_weights[layer]]
        self._heads = {layer: _draw_head(hidden, size, runtime.device, seed, layer) for layer in layers}
        self._optimizer = FusedAdamW([*self._parameters().values()], lr=lr) if layers else None

    def __call__(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """`[words, hidden]` -> `[words, size]`."""
        head = self._heads[layer]
        return F.linear(
            torch.relu(F.linear(states, head["weight_1"], head["bias_1"])), head["weight_2"], head["bias_2"]
        )

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {f"layer_{layer}.{name}": tensor for layer, head in self._heads.items() for name, tensor in head.items()}

    def step(self) -> None:
        """Updates the heads with the gradients of this step. Collective: call on all ranks of the stage."""
        if self._optimizer is None:
            return
        parameters = [*self._parameters().values()]
        # A step whose words were skipped leaves no gradient on any rank.
        if parameters[0].grad is None:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
        # Each rank has the gradient of its own words, multiplied by the data-parallel size for the model's averaging.
        dist.all_reduce(flat, group=self._runtime.groups.tp_dp_cp)
        flat /= self._runtime.data_size
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        if self._clip_grad:
            # Clipped separately: a joint norm would depend on which heads share a pipeline stage.
            for head in self._heads.values():
                torch.nn.utils.clip_grad_norm_(head.values(), self._clip_grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def sharded_state_dict(self) -> dict[str, Any]:
        """Heads and optimizer state for `dist_checkpointing`."""
        content = {}
        rank = self._runtime.groups.tp_dp_cp.rank()
        for name, parameter in self._parameters().items():
            assert self._optimizer is not None
            state = self._optimizer.state[parameter]
            moments = {moment: state.get(moment, torch.zeros_like(parameter)) for moment in ("exp_avg", "exp_avg_sq")}
            for part, tensor in {"weight": parameter.detach(), **moments}.items():
                key = f"projection_heads.{name}.{part}"
                content[key] = ShardedTensor.from_rank_offsets(key, tensor, replica_id=rank)
        for layer in self._heads:
            assert self._optimizer is not None
            # Saved per layer, although all are equal: a stage may have no head.
            key = f"projection_heads.layer_{layer}.step"
            step = torch.tensor([self._optimizer.param_groups[0].get("step", 0)])
            content[key] = ShardedTensor.from_rank_offsets(key, step, replica_id=rank)
        return content

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Loads heads and optimizer state saved from `sharded_state_dict`."""
        if self._optimizer is None:
            return
        for name, parameter in self._parameters().items():
            key = f"projection_heads.{name}"
            parameter.data.copy_(content[f"{key}.weight"])
            self._optimizer.state[parameter] = {
                moment: content[f"{key}.{moment}"].clone() for moment in ("exp_avg", "exp_avg_sq")
            }
        first = next(iter(self._heads))
        self._optimizer.param_groups[0]["step"] = int(content[f"projection_heads.layer_{first}.step"])


def _draw_head(hidden: int, size: int, device: torch.device, seed: int, layer: int) -> dict[str, torch.Tensor]:
    """Initial head, depends on (seed, layer) only: all ranks of a stage, and all layouts, start with the same one."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)

    def draw(*shape: int) -> torch.Tensor:
        # The range torch.nn.Linear uses.
        tensor = (2 * torch.rand(shape, generator=generator) - 1) * hidden**-0.5
        return tensor.to(device).requires_grad_()

    return {
        "weight_1": draw(hidden, hidden),
        "bias_1": draw(hidden),
        "weight_2": draw(size, hidden),
        "bias_2": draw(size),
    }

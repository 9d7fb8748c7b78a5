"""Builds Megatron-Core's optimizer and learning-rate schedule, with our AdamW where no fused one is installed."""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prealign.recipe import Recipe
from megatron_prealign.runtime.adam import FusedAdamW

_HELD = "megatron_prealign_held"


def _use_own_adam() -> None:
    """Makes Megatron-Core take `FusedAdamW` for the fused optimizer it did not find.

    Without Transformer Engine and Apex, 0.16.1 falls back to torch.optim.AdamW, whose sharded state it cannot load.
    The flags set here are the ones it sets itself when it finds Apex: `step` is then looked for in the parameter group.
    """
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        return
    megatron_optimizer.Adam = distrib_optimizer.Adam = FusedAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def build_optimizer(recipe: Recipe, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over the parameters of `chunks`, sharded over data-parallel ranks when the recipe says so."""
    _use_own_adam()
    section = recipe.optimizer
    bf16 = recipe.training.precision == "bf16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
    )
    # A group whose learning rate goes its own way, which 0.16.1 knows but only tells apart by this field.
    groups = {**get_standard_config_overrides(config), ParamKey(attr=_HELD): {"is_decoupled_lr": True}}
    return get_megatron_optimizer(config, list(chunks), config_overrides=groups)


def hold(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Marks parameters that some phases leave as they are; call before `build_optimizer`."""
    for parameter in parameters:
        setattr(parameter, _HELD, True)


def zero_frozen_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Makes the gradients of held parameters zero, so that they count neither in the norm nor in the moments."""
    held: list[torch.Tensor] = [
        getattr(parameter, "main_grad")  # noqa: B009  # Megatron-Core's own attribute, which mypy does not know
        for parameter in chain.from_iterable(chunk.parameters() for chunk in chunks)
        if getattr(parameter, _HELD, False)
    ]
    if held:
        torch._foreach_zero_(held)


def reset_optimizer(optimizer: MegatronOptimizer) -> None:
    """Forgets moments and step count, as for a fresh optimizer; fp32 master weights stay."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.optimizer.state.clear()
        for group in part.optimizer.param_groups:
            group.pop("step", None)


def build_schedule(
    optimizer: MegatronOptimizer,
    *,
    lr: float,
    min_lr: float,
    decay_style: str,
    warmup_iters: int,
    decay_iters: int,
    weight_decay: float,
    moves_held: bool = True,
) -> OptimizerParamScheduler:
    """Learning rate over `decay_iters` optimizer steps: linear warm-up, then `decay_style` down to `min_lr`.

    Args:
        moves_held: whether parameters marked by `hold` move too; at a learning rate of 0 neither the update nor the
            weight decay changes them.
    """
    for group in optimizer.param_groups:
        moves = moves_held or not group["is_decoupled_lr"]
        group["max_lr"], group["min_lr"] = (lr, min_lr) if moves else (0.0, 0.0)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=min_lr,
        lr_warmup_steps=warmup_iters,
        lr_decay_steps=max(decay_iters, warmup_iters + 1),
        lr_decay_style=decay_style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )

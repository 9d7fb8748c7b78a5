"""Builds Megatron-Core's optimizer and learning-rate schedule, with `FusedAdamW` where no fused optimizer is
installed."""

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

_FROZEN = "megatron_prealign_frozen"


def _use_own_adam() -> None:
    """Makes Megatron-Core use `FusedAdamW` in place of the missing fused optimizer.

    Without Transformer Engine and Apex, 0.16.1 falls back to torch.optim.AdamW, whose sharded state it cannot load.
    The flags set here are those it sets when it finds Apex; it then reads `step` from the parameter group.
    """
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        return
    megatron_optimizer.Adam = distrib_optimizer.Adam = FusedAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def build_optimizer(recipe: Recipe, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """Returns AdamW for the parameters of `chunks`, sharded over data-parallel ranks if the recipe enables it."""
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
    # Puts frozen parameters into separate groups, which 0.16.1 distinguishes only by this field.
    groups = {**get_standard_config_overrides(config), ParamKey(attr=_FROZEN): {"is_decoupled_lr": True}}
    return get_megatron_optimizer(config, list(chunks), config_overrides=groups)


def freeze(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Marks parameters that some phases keep frozen; call before `build_optimizer`."""
    for parameter in parameters:
        setattr(parameter, _FROZEN, True)


def zero_frozen_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Zeroes the gradients of frozen parameters, so that they affect neither the norm nor the moments."""
    frozen: list[torch.Tensor] = [
        getattr(parameter, "main_grad")  # noqa: B009  # set by Megatron-Core, unknown to mypy
        for parameter in chain.from_iterable(chunk.parameters() for chunk in chunks)
        if getattr(parameter, _FROZEN, False)
    ]
    if frozen:
        torch._foreach_zero_(frozen)


def reset_optimizer(optimizer: MegatronOptimizer) -> None:
    """Clears moments and step count, as in a fresh optimizer; fp32 master weights are kept."""
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
    updates_frozen: bool = True,
) -> OptimizerParamScheduler:
    """Returns a schedule over `decay_iters` optimizer steps: linear warm-up, then `decay_style` down to `min_lr`.

    Args:
        updates_frozen: Whether parameters marked by `freeze` are updated too. Otherwise their learning rate is 0, so
            that neither the update nor the weight decay changes them.
    """
    for group in optimizer.param_groups:
        updated = updates_frozen or not group["is_decoupled_lr"]
        group["max_lr"], group["min_lr"] = (lr, min_lr) if updated else (0.0, 0.0)
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

"""Builds Megatron-Core's optimizer and learning-rate schedule, with our AdamW where no fused one is installed."""

from collections.abc import Sequence

from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prealign.recipe import Recipe
from megatron_prealign.runtime.adam import FusedAdamW


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
    import torch

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
    return get_megatron_optimizer(config, list(chunks))


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
) -> OptimizerParamScheduler:
    """Learning rate over `decay_iters` optimizer steps: linear warm-up, then `decay_style` down to `min_lr`."""
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = lr, min_lr
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

"""AdamW for runs without Transformer Engine and Apex, in a form that Megatron-Core's distributed optimizer can save and
load.

torch's AdamW keeps `step` as a tensor in every parameter's state; Megatron-Core 0.16.1 then fails to load sharded
optimizer state (`KeyError: 'step'`). The fused optimizers of Transformer Engine and Apex keep `step` in the parameter
group. This class does the same, using torch's fused kernel.
"""

from collections.abc import Callable
from typing import Any

import torch


class FusedAdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay. `step` is kept in the parameter group; `exp_avg` and `exp_avg_sq` are fp32
    tensors."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("adam_w_mode is False, expected True: FusedAdamW supports only decoupled weight decay")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("closure is not supported by FusedAdamW")
        for group in self.param_groups:
            # Groups without parameters on this rank count steps too, so that all ranks save the same value.
            group["step"] = int(group.get("step", 0)) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            steps = torch.full((), float(group["step"]), device=parameters[0].device)
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                # The kernel reads one step tensor per parameter and does not write to it.
                [steps] * len(parameters),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )

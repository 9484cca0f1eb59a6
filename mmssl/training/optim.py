"""Optimizers and learning-rate schedules; a schedule is a function of the step, so there is none to save."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from mmssl.recipe import Optimizer, Training


def parameter_groups(module: nn.Module, weight_decay: float, decay: str = "weights") -> list[dict[str, Any]]:
    """Groups by weight decay and learning rate.

    Biases, norms and scalars (fewer than two dimensions), and what a network's library leaves out (`undecayed` of
    `Backbone`), are not decayed, unless `decay` is `all`. A parameter's attribute `lr_scale`, where
    it has one, multiplies the learning rate: layer-wise decay in fine-tuning sets it. One whose `lr_constant` is True
    keeps the peak learning rate throughout the run: SimSiam's predictor.
    """
    spared = {id(parameter) for part in module.modules() for parameter in getattr(part, "undecayed", ())}
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter in module.parameters():
        if parameter.requires_grad:
            rate = getattr(parameter, "lr_scale", 1.0), getattr(parameter, "lr_constant", False)
            decays = decay == "all" or (parameter.ndim > 1 and id(parameter) not in spared)
            groups[decays, *rate].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "decays": decays,
            "always_adapt": decays,
            "lr_scale": scale,
            "lr_constant": constant,
        }
        for (decays, scale, constant), parameters in groups.items()
    ]


def make_optimizer(module: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum, LARS (You et al. 2017) or LAMB (You et al. 2019).

    The last two adapt the step of what is decayed, though by 0, and of nothing else: SimCLR, BYOL and ALBERT leave the
    same parameters out of both. LAMB is that of ALBERT's published code: moments are not corrected for their start at
    0, which warm-up makes up for. Clipping is the loop's.

    AdamW and SGD take one fused pass over the weights where that is faster. It pairs gradients and moments with weights
    in the order of memory, so all have the strides of the weights: autograd sees to the gradients, a checkpoint's
    reader to the moments.
    """
    groups = parameter_groups(module, settings.weight_decay, settings.decay)
    devices = {parameter.device.type for parameter in module.parameters()}
    if settings.name == "adamw":
        fused = devices <= {"cpu"} or devices <= {"cuda"}
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
    if settings.name == "sgd":
        # On a CPU the fused pass is slower where the weights exceed the caches.
        return torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov, fused=devices <= {"cuda"}
        )
    if settings.name == "lamb":
        from timm.optim.lamb import Lamb

        return Lamb(
            groups,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            bias_correction=False,  # its count of steps would not be among the parameters' state, which is saved
            max_grad_norm=None,
        )
    from timm.optim.lars import Lars

    return Lars(groups, lr=settings.lr, momentum=settings.momentum, eps=settings.eps)


def lr_factor(training: Training, step: int) -> float:
    """Share of the peak learning rate at `step` (from 0); see `mmssl.recipe.Schedule`.

    Linear warm-up reaches 1 at step `warmup`.
    """
    schedule, unit = training.schedule, training.steps_per_unit
    warmup = round(schedule.warmup * unit)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "multistep":
        return float(schedule.gamma ** sum(step >= round(time * unit) for time in schedule.milestones))
    if schedule.name == "inverse_sqrt":
        return math.sqrt(warmup / max(step, warmup))
    progress = (step - warmup) / max(1, training.steps - warmup)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.final + (1 - schedule.final) * decay


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr` times its own scale; a constant one stays at the peak it began with."""
    for group in optimizer.param_groups:
        if not group["lr_constant"]:
            group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: torch.optim.Optimizer, settings: Optimizer, progress: float) -> None:
    """Give the groups that decay their weight decay at `progress`, from 0 at the first step to 1 at the end."""
    if settings.weight_decay_end is None:
        return
    start, end = settings.weight_decay, settings.weight_decay_end
    decay = end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        if group["decays"]:
            group["weight_decay"] = decay

"""BatchNorm over the rows of all processes, on devices for which torch has none of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmssl.ops.gather import gather, process_share, total


class SynchronizedBatchNorm(_BatchNorm):
    """What `torch.nn.SyncBatchNorm` is, on a CPU: statistics and gradients are those of the global batch.

    Args:
        norm: whose parameters, buffers and settings it takes over, with the activation that timm's have inside.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of places."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, channels, ...) -> the same."""
        apart = process_share()[1] == 1 or not (self.training or self.running_mean is None)
        return self.act(self.drop(super().forward(input) if apart else self._normalized(input)))

    def _normalized(self, input: Tensor) -> Tensor:
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        over = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = total(x.new_tensor(x.numel() / x.shape[1]))
        mean = gather(x.sum(over)[None]).sum(0) / count
        x = x - mean.view(shape)
        variance = gather(x.square().sum(over)[None]).sum(0) / count
        if self.training:
            self._keep(mean.detach(), (variance * count / (count - 1)).detach())
        x = x * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)

    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        kept, varied, steps = self.running_mean, self.running_var, self.num_batches_tracked
        if kept is None or varied is None or steps is None:
            return
        steps += 1
        share = 1 / float(steps) if self.momentum is None else self.momentum
        kept.lerp_(mean.to(kept.dtype), share)
        varied.lerp_(variance.to(varied.dtype), share)


def synchronize(module: nn.Module, device: torch.device) -> None:
    """Let every BatchNorm inside a module see the rows of all processes; in place.

    Args:
        module: no norm itself.
        device: that it will be on.
    """
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(module)  # torch's own would drop the activations that norms of timm have inside
        return
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, SynchronizedBatchNorm(child))
        else:
            synchronize(child, device)

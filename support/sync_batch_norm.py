"""Batch norm over the whole batch of several processes. torch.nn.SyncBatchNorm does the same, but only on GPUs."""

import torch
import torch.distributed as dist
from torch import nn

from support.distributed import rank_and_world_size


class AllReduceSum(torch.autograd.Function):
    """The sum of every process's tensor, with gradients (torch.distributed.nn, which has it, is deprecated)."""

    @staticmethod
    def forward(_, values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_, gradient):
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm of (N, C, h, w) over the equal batches of all processes."""

    def forward(self, x):
        if not self.training or rank_and_world_size()[1] == 1:
            return super().forward(x)
        values = x.float()
        count = values[:, 0].numel() * rank_and_world_size()[1]
        mean = AllReduceSum.apply(values.sum((0, 2, 3))) / count
        values = values - mean[:, None, None]
        var = AllReduceSum.apply(values.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (values * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def use_sync_batch_norm(net):
    """Replace the batch norms of a Generator or Discriminator by SyncBatchNorm."""
    for i, layer in enumerate(net.main):
        if isinstance(layer, nn.BatchNorm2d):
            net.main[i] = SyncBatchNorm(layer.num_features)
            net.main[i].load_state_dict(layer.state_dict())

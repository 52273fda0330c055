"""Batch norm over the batches of all processes."""

import torch
import torch.distributed as dist
from torch import nn

from support.distributed import place


class AllSum(torch.autograd.Function):
    """The sum of every process's tensor, through which gradients flow back to all of them."""

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
    """Batch norm over the batches of all processes (torch's own of this name does not run on a CPU).

    counted: 0.0 where this process's batch is none of the pictures, only there to take part.
    """

    counted = 1.0

    def forward(self, x):
        if not self.training or place()[1] == 1:
            return super().forward(x)
        values = x.float()
        sums = torch.cat([values.sum((0, 2, 3)), values.new_tensor([x[:, 0].numel()])])
        sums = AllSum.apply(self.counted * sums)
        count, mean = sums[-1], sums[:-1] / sums[-1]
        values = values - mean[:, None, None]
        var = AllSum.apply(self.counted * values.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (values * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronize_batch_norm(net):
    """Replace the batch norms of a Generator or Discriminator by such as see the batches of all processes."""
    for i, layer in enumerate(net.main):
        if isinstance(layer, nn.BatchNorm2d):
            net.main[i] = SyncBatchNorm(layer.num_features)
            net.main[i].load_state_dict(layer.state_dict())

"""The innermost layers on a CPU, as matrix products."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


def multiply_innermost(net):
    """Let the innermost convolutions of a Generator or Discriminator be matrix products while it trains in float32.

    What is computed stays the same but for rounding. oneDNN's convolutions are slow where a map is a single point (the
    paper's 100 x 512 and 512 x 1 take eight times as long), and where weights far outnumber the points of a map (the
    512 x 256 on 4 x 4, 1.27 times; two AVX-512 cores, batches of 128). Four times the input is kept for the gradients.
    """
    layers = [layer for layer in net.main if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    dense, strided = layers[:2] if layers[0].transposed else layers[:-3:-1]
    points, weights = dense.weight[0, 0].numel(), strided.weight[..., 0, 0].numel()
    chosen = [dense, strided] if weights > 5_000 * points else [dense]  # 512 x 256 on 5 x 5; on 6 x 6 nothing is gained
    for layer in chosen:
        layer.__class__ = MultipliedTransposed if layer.transposed else Multiplied


class Multiplied(nn.Conv2d):
    """A convolution of a Discriminator: (N, C, s, s) to (N, C', s / 2, s / 2), or by a kernel of s to (N, C', 1, 1)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x, weight = x.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1).flatten(1)  # (C', k k C)
        dense = self.stride == (1, 1)
        rows, side = (x.flatten(1), 1) if dense else (Windows.apply(x), x.shape[1] // 2)
        return (rows @ weight.T).view(len(x), side, side, -1).permute(0, 3, 1, 2)


class MultipliedTransposed(nn.ConvTranspose2d):
    """A transposed one of a Generator: (N, C, s, s) to (N, C', 2 s, 2 s), or (N, C, 1, 1) to (N, C', k, k)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C, k k C')
        rows, dense = x.permute(0, 2, 3, 1).flatten(0, 2) @ weight, self.stride == (1, 1)
        y = rows.view(len(x), *self.kernel_size, -1) if dense else Overlap.apply(rows, x.shape[2])
        return y.permute(0, 3, 1, 2)


class Windows(torch.autograd.Function):
    """The windows of 4 x 4, two apart, of (N, 2b, 2b, C) in a border of zeros, as the rows of (N b b, 16 C)."""

    @staticmethod
    def forward(context, x):
        context.side = x.shape[1] // 2
        x = F.pad(x, (0, 0, 1, 1, 1, 1)).contiguous()
        (n, _, _, channels), (picture, line, point, _) = x.shape, x.stride()
        shape = (n, context.side, context.side, 4, 4 * channels)
        return x.as_strided(shape, (picture, 2 * line, 2 * point, line, 1)).reshape(-1, 16 * channels)

    @staticmethod
    def backward(context, gradient):
        return Overlap.apply(gradient, context.side)


class Overlap(torch.autograd.Function):
    """The transpose of Windows: lay the rows out as windows of (N, 2b, 2b, C), and add what lies on one point."""

    @staticmethod
    def forward(context, rows, side):
        rows = rows.reshape(-1, side, side, 2, 2, 2, 2, rows.shape[1] // 16)  # a window as 2 x 2 tiles of 2 x 2 points
        tiles = rows.new_zeros(len(rows), side + 1, 2, side + 1, 2, rows.shape[-1])
        for down, right in itertools.product((0, 1), (0, 1)):
            tiles[:, down : down + side, :, right : right + side] += rows[:, :, :, down, :, right].transpose(2, 3)
        return tiles.flatten(3, 4).flatten(1, 2)[:, 1:-1, 1:-1].contiguous()

    @staticmethod
    def backward(context, gradient):
        return Windows.apply(gradient), None

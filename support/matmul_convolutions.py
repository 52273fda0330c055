"""The convolutions with the smallest feature maps, as matrix products."""

import itertools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def use_matmul_convolutions(net, device):
    """Replace G's first convolution, or D's last, by a matrix product for training, where that is faster.

    On an Intel CPU, replace G's second or D's last but one as well. On a CPU this is meant for float32 alone.

    The results are the same but for rounding. Libraries' convolutions are slow where a map is a single point (100 x 512
    and 512 x 1 channels): oneDNN's take eight times as long (Intel), and on an H200 a step takes 8% longer (bfloat16,
    64 x 64, batch of 128; float32 and AMD GPUs were not measured).
    oneDNN's are also slow where weights far outnumber the points of a map (512 x 256 on 4 x 4: 1.27 times; two Intel
    cores with AVX-512, batches of 128). MKL computes the products, and is slower on other makers' processors: there the
    second replacement would cost 5% (two AMD cores). In D, the second product keeps four times its input for the
    gradients.
    """
    indices = [i for i, layer in enumerate(net.main) if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    innermost, next_one = indices[:2] if net.main[indices[0]].transposed else indices[:-3:-1]
    positions, weights = net.main[innermost].weight[0, 0].numel(), net.main[next_one].weight[..., 0, 0].numel()
    # 512 x 256 on 5 x 5 gains; on 6 x 6 it does not.
    both = device.type == "cpu" and weights > 5_000 * positions and is_intel()
    for i in [innermost, next_one] if both else [innermost]:
        net.main[i] = as_matmul(net.main[i])


def is_intel():
    """Return whether the processor is known to be Intel's. (A rule by timing would break exact resume.)"""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return "GenuineIntel" in platform.processor()


def as_matmul(layer):
    """Return a convolution of a Generator or Discriminator as a matrix product that has the same weights."""
    kind = MatmulConvTranspose2d if layer.transposed else MatmulConv2d
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    with torch.device("meta"):
        product = kind(*sizes, bias=False)
    product.weight = layer.weight
    return product.train(layer.training)


class MatmulConv2d(nn.Conv2d):
    """A convolution of a Discriminator: (N, C, s, s) to (N, C', s / 2, s / 2), or with a kernel of s to (N, C', 1, 1).

    A matrix product in training mode; in eval mode, a convolution.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x, weight = x.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1).flatten(1)  # (C', k k C)
        is_innermost = self.stride == (1, 1)
        rows, side = (x.flatten(1), 1) if is_innermost else (Im2col.apply(x), x.shape[1] // 2)
        return (rows @ weight.T).view(len(x), side, side, -1).permute(0, 3, 1, 2)


class MatmulConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution of a Generator: (N, C, s, s) to (N, C', 2 s, 2 s), or (N, C, 1, 1) to (N, C', k, k).

    A matrix product in training mode; in eval mode, a convolution.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C, k k C')
        rows, is_innermost = x.permute(0, 2, 3, 1).flatten(0, 2) @ weight, self.stride == (1, 1)
        y = rows.view(len(x), *self.kernel_size, -1) if is_innermost else Col2im.apply(rows, x.shape[2])
        return y.permute(0, 3, 1, 2)


class Im2col(torch.autograd.Function):
    """The 4 x 4 windows, with stride 2, of (N, 2b, 2b, C) padded by zeros, as the rows of (N b b, 16 C)."""

    @staticmethod
    def forward(context, x):
        context.side = x.shape[1] // 2
        x = F.pad(x, (0, 0, 1, 1, 1, 1)).contiguous()
        (n, _, _, channels), (image, row, point, _) = x.shape, x.stride()
        shape = (n, context.side, context.side, 4, 4 * channels)
        return x.as_strided(shape, (image, 2 * row, 2 * point, row, 1)).reshape(-1, 16 * channels)

    @staticmethod
    def backward(context, gradient):
        return Col2im.apply(gradient, context.side)


class Col2im(torch.autograd.Function):
    """The transpose of Im2col: place the rows as windows of (N, 2b, 2b, C), and add where they overlap."""

    @staticmethod
    def forward(context, rows, side):
        rows = rows.reshape(-1, side, side, 2, 2, 2, 2, rows.shape[1] // 16)  # a window as 2 x 2 tiles of 2 x 2 points
        tiles = rows.new_zeros(len(rows), side + 1, 2, side + 1, 2, rows.shape[-1])
        for down, right in itertools.product((0, 1), (0, 1)):
            tiles[:, down : down + side, :, right : right + side] += rows[:, :, :, down, :, right].transpose(2, 3)
        return tiles.flatten(3, 4).flatten(1, 2)[:, 1:-1, 1:-1].contiguous()

    @staticmethod
    def backward(context, gradient):
        return Im2col.apply(gradient), None

"""The two networks of DCGAN (Radford, Metz, Chintala 2016, arXiv:1511.06434), their initialisation and weights files.

>>> from models import latents, load_generator, pictures
>>> faces = pictures(load_generator("out"), latents(range(64), nz=100))  # (64, 3, 64, 64) uint8
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from support.accelerator import fastest_layout
from support.errors import ModelError
from support.weights import load_network

# The sides a DCGAN can have: a first map of 4..7, doubled at least twice.
IMAGE_SIZES = tuple(sorted(b << k for b in range(4, 8) for k in range(2, 9) if b << k <= 1024))


def check_image_size(image_size):
    """Raise ModelError, naming the nearest sizes that work, if no DCGAN has pictures of this side."""
    if image_size not in IMAGE_SIZES:
        nearest = [s for s in IMAGE_SIZES if s < image_size][-1:] + [s for s in IMAGE_SIZES if s > image_size][:1]
        raise ModelError(
            f"a side of {image_size} is not possible; the nearest that work: {' and '.join(map(str, nearest))}"
            f" (all: {', '.join(map(str, IMAGE_SIZES))})"
        )


def first_map_and_doublings(image_size):
    """Return (b, k), 4 <= b <= 7 and k >= 2, with b * 2**k == image_size: 64 -> (4, 4), 28 -> (7, 2)."""
    check_image_size(image_size)
    doublings = image_size.bit_length() - 3  # 4..7 are the numbers of three bits
    return image_size >> doublings, doublings


def channel_multipliers(doublings):
    """Return the hidden maps' channels as multiples of ngf (ndf), from the picture inwards: 1, 2, 4, 8, 16, 16, ..."""
    return [min(2**i, 16) for i in range(doublings)]


def weights_init(module):
    """Initialise one layer as the paper does (section 4): weights N(0, 0.02); batch norm's scale N(1, 0.02), shift 0.

    Use as `net.apply(weights_init)`; deterministic under `torch.manual_seed`.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """G(z): latents (N, nz) or (N, nz, 1, 1) from N(0, 1) to pictures (N, nc, image_size, image_size) in [-1, 1].

    Layers, shapes and names are those of the paper (figure 1, section 3) and of the public PyTorch example. Raises
    ModelError for an image_size not in IMAGE_SIZES.
    """

    def __init__(self, nz=100, ngf=64, nc=3, image_size=64):
        super().__init__()
        self.nz, self.ngf, self.nc, self.image_size = nz, ngf, nc, image_size
        b, doublings = first_map_and_doublings(image_size)
        channels = [ngf * m for m in reversed(channel_multipliers(doublings))]
        layers = [nn.ConvTranspose2d(nz, channels[0], b, 1, 0, bias=False)]  # at 64: 100 x 1 x 1 -> 512 x 4 x 4
        for c_in, c_out in zip(channels, channels[1:] + [nc], strict=True):
            layers += [nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]  # 256 x 8, 128 x 16, 64 x 32, 3 x 64
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.apply(weights_init)

    def forward(self, z):
        return self.main(z.reshape(z.shape[0], self.nz, 1, 1))  # (N, nc, image_size, image_size)


class Discriminator(nn.Module):
    """D(x): pictures (N, nc, image_size, image_size) in [-1, 1] to p(real | x), shape (N,), in [0, 1].

    `logits(x)` is the value before the sigmoid; training uses it. Raises ModelError for an image_size not in
    IMAGE_SIZES.
    """

    def __init__(self, ndf=64, nc=3, image_size=64):
        super().__init__()
        self.ndf, self.nc, self.image_size = ndf, nc, image_size
        b, doublings = first_map_and_doublings(image_size)
        channels = [ndf * m for m in channel_multipliers(doublings)]
        layers = [nn.Conv2d(nc, channels[0], 4, 2, 1, bias=False)]  # at 64: 3 x 64 x 64 -> 64 x 32 x 32
        layers += [nn.LeakyReLU(0.2, inplace=True)]
        for c_in, c_out in itertools.pairwise(channels):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)]  # 128 x 16 x 16, 256 x 8 x 8, 512 x 4 x 4
            layers += [nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.Conv2d(channels[-1], 1, b, 1, 0, bias=False)]  # 1 x 1 x 1
        self.main = nn.Sequential(*layers, nn.Sigmoid())
        self.apply(weights_init)

    def logits(self, x):
        for layer in list(self.main)[:-1]:
            x = layer(x)
        return x.flatten()  # (N,)

    def forward(self, x):
        return self.main[-1](self.logits(x))  # (N,)


@torch.no_grad()
def pictures(netG, z):
    """Return the pictures of z, (N, nz), as uint8 (N, nc, image_size, image_size) on the CPU; batch norm in eval mode.

    A convolution's last bits depend on the size of its batch and on the layout of its weights. The network therefore
    always sees blocks of one size, and gets the fastest layout, so that a picture depends on its own latent alone, not
    on how many are made together.
    """
    device, was_training = next(netG.parameters()).device, netG.training
    block = max(1, 64 * 64 * 64 // max(64, netG.image_size) ** 2)  # 64 pictures at 64 x 64, fewer of the larger ones
    netG.eval().to(memory_format=fastest_layout(device))
    blocks = []
    for part in z.flatten(1).split(block):
        x = netG(F.pad(part, (0, 0, 0, block - len(part))).to(device))[: len(part)]
        blocks.append(x.mul(127.5).add(127.5).round().to(torch.uint8))
    netG.train(was_training)
    return torch.cat(blocks).cpu()


@torch.no_grad()
def set_batch_norm_statistics(netG, noise):
    """Replace G's running mean and variance by the exact ones over all of `noise`, an iterable of latents (N, nz).

    Each batch is normalised by its own statistics, as in training; those of the batches, all of one size, are pooled.
    Nothing but the running statistics changes. Without it a picture made alone (eval mode) suffers from a moving
    average that lags behind the weights, or, for averaged weights, belongs to others.
    """
    layers = list(netG.main)
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    means, squares = [[] for _ in norms], [[] for _ in norms]
    for z in noise:
        x, i = z.reshape(-1, netG.nz, 1, 1), 0
        for layer in layers:
            if isinstance(layer, nn.BatchNorm2d):
                var, mean = (v.cpu().double() for v in torch.var_mean(x, (0, 2, 3), correction=0))
                means[i].append(mean)
                squares[i].append(var + mean**2)  # E[x^2] = Var[x] + E[x]^2
                x, i = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps), i + 1
            else:
                x = layer(x)
    for norm, mean, square in zip(norms, means, squares, strict=True):
        mean, square = torch.stack(mean).mean(0), torch.stack(square).mean(0)
        norm.running_mean.copy_(mean.float())
        norm.running_var.copy_((square - mean**2).float())


def load_generator(path, average=True):
    """Read a generator: in eval mode, on the CPU, its nz, ngf, nc and image_size read off the shapes of the weights.

    path: a weights file of any DCGAN of these shapes, whatever its layers are called, bare or nested in a dictionary;
    a checkpoint; or a run folder (the best that was measured, or the newest). `average`: where both are there, the
    averaged generator, not the plain.
    Raises ModelError, one line, if there is none, or its weights are of another shape or not finite.
    """
    return load_network(Generator, path, average)


def load_discriminator(path):
    """Read a discriminator as `load_generator` reads a generator."""
    return load_network(Discriminator, path, False)

"""The two networks of DCGAN (Radford, Metz, Chintala 2016, arXiv:1511.06434), their initialisation, and sampling.

>>> from models import generate_images, latents, load_generator
>>> netG = load_generator("out")
>>> images = generate_images(netG, latents(range(64), netG.nz))  # (64, 3, 64, 64) uint8
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from support.accelerator import fastest_memory_format, reproducible_kernels
from support.image_sizes import channel_multipliers, check_image_size, smallest_map_and_doublings
from support.latents import latents
from support.weights import load_network

__all__ = [
    "Discriminator",
    "Generator",
    "check_image_size",
    "generate_images",
    "latents",
    "load_discriminator",
    "load_generator",
    "set_batch_norm_statistics",
    "weights_init",
]


def weights_init(module):
    """Initialise one layer: weights N(0, 0.02²), as in the paper (section 4); batch norm's scale N(1, 0.02²), shift 0.

    Use as `net.apply(weights_init)`; deterministic under `torch.manual_seed`.
    """
    if any(weight.is_meta for weight in module.parameters(recurse=False)):  # it has no values; normal_ would take 2 s
        return
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """G(z): latent vectors (N, nz) or (N, nz, 1, 1) from N(0, 1) to images (N, nc, image_size, image_size) in [-1, 1].

    The architecture's rules are the paper's (section 3); kernels, channels and names are those of the public PyTorch
    example. Raises UserError for an image_size not in IMAGE_SIZES.
    """

    # What weights do not tell; printed when those of another program are loaded.
    assumptions = "latent vectors from N(0, 1); batch norm with eps 1e-5, then ReLU; tanh at the end; "
    assumptions += "stride 1 and padding 0 in the first layer, then 2 and 1"

    def __init__(self, nz=100, ngf=64, nc=3, image_size=64):
        super().__init__()
        self.nz, self.ngf, self.nc, self.image_size = nz, ngf, nc, image_size
        side, doublings = smallest_map_and_doublings(image_size)
        channels = [ngf * m for m in reversed(channel_multipliers(doublings))]
        layers = [nn.ConvTranspose2d(nz, channels[0], side, 1, 0, bias=False)]  # at 64: 100 x 1 x 1 -> 512 x 4 x 4
        for c_in, c_out in zip(channels, channels[1:] + [nc], strict=True):
            layers += [nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]  # 256 x 8 x 8, ..., 3 x 64 x 64
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.apply(weights_init)

    def forward(self, z):
        return self.main(z.reshape(z.shape[0], self.nz, 1, 1))  # (N, nc, image_size, image_size)

    @staticmethod
    def arguments_from_shapes(first, last, doublings):
        """Return the arguments of a generator whose first and last weights have these shapes."""
        return {"nz": first[0], "ngf": last[0], "nc": last[1], "image_size": first[2] << doublings}


class Discriminator(nn.Module):
    """D(x): images (N, nc, image_size, image_size) in [-1, 1] to the probability that they are real, (N,) in [0, 1].

    `logits(x)` is the value before the sigmoid; training uses it. Raises UserError for an image_size not in
    IMAGE_SIZES.
    """

    assumptions = "batch norm with eps 1e-5, then LeakyReLU(0.2); sigmoid at the end; "
    assumptions += "stride 2 and padding 1, in the last layer 1 and 0"

    def __init__(self, ndf=64, nc=3, image_size=64):
        super().__init__()
        self.ndf, self.nc, self.image_size = ndf, nc, image_size
        side, doublings = smallest_map_and_doublings(image_size)
        channels = [ndf * m for m in channel_multipliers(doublings)]
        layers = [nn.Conv2d(nc, channels[0], 4, 2, 1, bias=False)]  # at 64: 3 x 64 x 64 -> 64 x 32 x 32
        layers += [nn.LeakyReLU(0.2, inplace=True)]
        for c_in, c_out in itertools.pairwise(channels):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)]  # 128 x 16 x 16, 256 x 8 x 8, 512 x 4 x 4
            layers += [nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.Conv2d(channels[-1], 1, side, 1, 0, bias=False)]  # 1 x 1 x 1
        self.main = nn.Sequential(*layers, nn.Sigmoid())
        self.apply(weights_init)

    def logits(self, x):
        for layer in list(self.main)[:-1]:
            x = layer(x)
        return x.flatten()  # (N,)

    def forward(self, x):
        return self.main[-1](self.logits(x))  # (N,)

    @staticmethod
    def arguments_from_shapes(first, last, doublings):
        """Return the arguments of a discriminator whose first and last weights have these shapes."""
        return {"ndf": first[0], "nc": first[1], "image_size": last[2] << doublings}


@torch.no_grad()
def generate_images(netG, z):
    """Return the images of z, (N, nz), with batch norm in eval mode: uint8 (N, nc, image_size, image_size) on the CPU.

    An image depends only on the weights and on its own latent vector, as long as device and PyTorch version stay the
    same. A convolution's last bits depend on the batch size and on the memory format of its weights. So netG is
    converted to one memory format, and stays so; batches are padded to one size; and on CUDA, kernels are not chosen
    by timing.
    """
    device, was_training = next(netG.parameters()).device, netG.training
    block = max(1, 64 * 64 * 64 // max(64, netG.image_size) ** 2)  # 64 images at 64 x 64, fewer of larger ones
    netG.eval().to(memory_format=fastest_memory_format(device))
    blocks = []
    try:
        with reproducible_kernels():
            for part in z.flatten(1).split(block):
                x = netG(F.pad(part, (0, 0, 0, block - len(part))).to(device))[: len(part)]
                blocks.append(x.mul(127.5).add(127.5).round().to(torch.uint8))  # [-1, 1] to [0, 255]
    finally:
        netG.train(was_training)
    return torch.cat(blocks).cpu()


@torch.no_grad()
def set_batch_norm_statistics(netG, z):
    """Replace G's running means and variances by those over all latent vectors z, (batches, N, nz).

    Each batch is normalised by its own statistics, as in training; those of all batches are pooled. Nothing else
    changes. Without this, images generated in eval mode suffer: the stored statistics are a moving average that
    lags behind the weights, and with averaged weights they belong to other weights.
    """
    norms = {layer: ([], []) for layer in netG.main if isinstance(layer, nn.BatchNorm2d)}
    layers = list(netG.main)[:-3]  # up to the last batch norm: what follows changes no statistics
    for batch in z:
        x = batch.reshape(-1, netG.nz, 1, 1)
        for layer in layers:
            if layer in norms:
                for values, value in zip(norms[layer], torch.var_mean(x, (0, 2, 3), correction=0), strict=True):
                    values.append(value)
                x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
            else:
                x = layer(x)
    for norm, statistics in norms.items():
        var, mean = (torch.stack(values).cpu().double() for values in statistics)
        square = (var + mean**2).mean(0)  # E[x^2] = Var[x] + E[x]^2
        norm.running_mean.copy_(mean.mean(0).float())
        norm.running_var.copy_((square - mean.mean(0) ** 2).float())


def load_generator(path, average=True):
    """Return a generator from a file, in eval mode on the CPU; nz, ngf, nc and image_size follow from its weights.

    path: a weights file of any DCGAN with layers of this program's shapes, under any names, alone or in a dictionary;
    a checkpoint; or a run folder.
    average: return the generator to sample from. That is the averaged one rather than the plain one; in a run folder,
    netG_best.pth, or else the newest weights; in a checkpoint, the weights with its contrast factor applied. Without
    `average`, prefer the plain generator, and return the weights as the file holds them.
    Prints what it assumes about another program's network, such as its activations, since weights do not tell. Raises
    UserError if there is no generator, or if its weights have other shapes or are not finite.
    """
    return load_network(Generator, Discriminator, path, average)


def load_discriminator(path):
    """Return a discriminator from a file, as `load_generator` returns a generator."""
    return load_network(Discriminator, Generator, path, average=False)

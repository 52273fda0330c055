"""The two networks of DCGAN (Radford, Metz, Chintala 2016, arXiv:1511.06434), their initialisation and weights files.

>>> from models import latents, load_generator, pictures
>>> faces = pictures(load_generator("out"), latents(range(64), nz=100))  # (64, 3, 64, 64) uint8
"""

import argparse
import contextlib
import itertools
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# The sides a DCGAN can have: a first map of 4..7, doubled at least twice.
IMAGE_SIZES = tuple(sorted(b << k for b in range(4, 8) for k in range(2, 9) if b << k <= 1024))


class ModelError(ValueError):
    """A size no network can have, or a file that does not hold the weights asked for. The message is one line."""


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


def latents(seeds, nz):
    """Return one latent from N(0, 1) per seed, (len(seeds), nz) on the CPU, each with a random state of its own."""
    z, state = torch.empty(len(seeds), nz), torch.Generator()
    for row, seed in zip(z.unbind(), seeds, strict=True):
        row.normal_(generator=state.manual_seed(seed))
    return z


def fastest_layout(device):
    """Return the memory format in which a network is fastest on `device`."""
    # On mps, the gradient of batch norm is wrong in channels-last (pytorch issue 175189).
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


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


def weights_of(net):
    """Return a copy of the network's state dict as contiguous CPU tensors, the form every weights file has."""
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in net.state_dict().items()}


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


def load_network(kind, path, average):
    """Read a Generator or Discriminator (`kind`) for the two functions above."""
    path = Path(path)
    if path.is_dir():
        path = newest_weights(path, "netG" if kind is Generator else "netD", average)
    candidates = list(state_dicts(read_file(path)))
    size = path.stat().st_size
    for _, state in candidates:
        if sum(t.numel() * t.element_size() for t in state.values()) > size:  # views can be of any size
            raise ModelError(f"{path} claims to hold larger weights than fit into its {size:,} bytes")
    fitting = [(("ema" in name.lower()) == average, fit(kind, state)) for name, state in candidates]
    preferred = max((match for match in fitting if match[1]), key=lambda match: match[0], default=None)
    if not preferred:
        wanted, other = ("generator", Discriminator) if kind is Generator else ("discriminator", Generator)
        mixed_up = any(fit(other, state) for _, state in candidates)
        why = f"it holds a {other.__name__.lower()}" if mixed_up else "no weights in it have the shapes of one"
        raise ModelError(f"{path} is not the {wanted} of a DCGAN: {why}")
    net = preferred[1].float().eval()
    bad = [name for name, t in net.state_dict().items() if not t.isfinite().all()]
    if bad:
        raise ModelError(
            f"{path} holds weights that are not finite ({bad[0]}), its run had diverged: use an earlier file"
        )
    return net


def newest_weights(folder, role, average):
    """Return the file of a run folder with the newest weights of "netG" or "netD": one per epoch, or the checkpoint.

    With `average`, netG_best.pth goes before all, if it is there: that of the epoch that was measured the best.
    """
    if average and role == "netG" and (folder / "netG_best.pth").is_file():
        return folder / "netG_best.pth"
    by_age = []  # (epochs done, steps after that, preference, path)
    for path in folder.glob(f"{role}*_epoch_*.pth"):
        match = re.fullmatch(rf"{role}(_ema)?_epoch_(\d+)\.pth", path.name)
        if match:
            by_age.append((int(match[2]) + 1, 0, 2 if bool(match[1]) == average else 0, path))
    for checkpoint in (folder / "checkpoint.pth", folder / "checkpoint.prev.pth"):
        with contextlib.suppress(ModelError, KeyError, TypeError):  # damaged: there may be whole files beside it
            state = read_file(checkpoint)
            by_age.append((state["epoch"], state["step"], 1, checkpoint))
    if not by_age:
        raise ModelError(f"{folder} holds no weights that can be read, as {role}_epoch_0.pth or checkpoint.pth")
    return max(by_age, key=lambda entry: entry[:3])[3]


def read_file(path):
    """Return what torch.save wrote to `path`, on the CPU. Raises ModelError, one line.

    It runs no code from the file, takes memory only for what is in it, and finds every changed byte of a tensor.
    """
    try:
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # settings are often saved beside the weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            why = "it holds more than tensors and plain settings, which could run code; save the state_dict() alone"
        else:
            why = "it is damaged, or not a file that torch.save wrote"
        raise ModelError(f"{path} cannot be read as weights: {why}") from None


def check_archive(path):
    """Raise ModelError if `path` is a zip archive, as torch.save writes, with packed or damaged parts."""
    if not zipfile.is_zipfile(path):  # an older file, which has no checksums; or none of torch's
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):  # could unpack to any size
            raise ModelError(f"{path} cannot be read as weights: its parts are packed, which torch.save never does")
        damaged = archive.testzip()
        if damaged:
            raise ModelError(f"{path} is damaged: {damaged} in it is not what was written")


def state_dicts(tree, name="", above=()):
    """Yield (name, state dict) for every dictionary in `tree`, however deep, that has convolution weights in it."""
    if not isinstance(tree, dict) or len(above) > 20 or any(tree is other for other in above):
        return
    plain = {str(key): t for key, t in tree.items() if isinstance(t, torch.Tensor) and t.layout == torch.strided}
    tensors = {key: t for key, t in plain.items() if t.device.type == "cpu"}  # not one without contents
    if any(t.dim() == 4 for t in tensors.values()):
        yield name, tensors
        parts = {}
        for key, t in tensors.items():
            parts.setdefault(key.split(".")[0], {})[key] = t
        if all(any(t.dim() == 4 for t in part.values()) for part in parts.values()):  # both networks in one dictionary
            yield from ((f"{name}.{part}", state) for part, state in parts.items())
    for key, value in tree.items():
        yield from state_dicts(value, f"{name}.{key}", (*above, tree))


def layers_of(state):
    """Return (names of the convolutions' weights, prefixes of the batch norms' tensors), in the order of the layers."""
    convolutions = [name for name, t in state.items() if t.dim() == 4]
    norms = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    return convolutions, norms


def fit(kind, state):
    """Return a Generator or Discriminator (`kind`) with the weights of `state`, or None if their shapes are not one's.

    Layers are told by the order and the shapes of their weights, never by their names.
    """
    convolutions, norms = layers_of(state)
    if len(convolutions) < 3 or not all(state[name].is_floating_point() for name in convolutions):
        return None
    first, last, doublings = state[convolutions[0]].shape, state[convolutions[-1]].shape, len(convolutions) - 1
    try:
        with torch.device("meta"):  # shapes alone, no storage
            if kind is Generator:
                net = Generator(nz=first[0], ngf=last[0], nc=last[1], image_size=first[2] << doublings)
            else:
                net = Discriminator(ndf=first[0], nc=first[1], image_size=last[2] << doublings)
    except ModelError:
        return None
    expected = net.state_dict()
    our_convolutions, our_norms = layers_of(expected)
    theirs = dict(zip(our_convolutions, convolutions, strict=False))
    for ours, their in zip(our_norms, norms, strict=False):
        theirs |= {name: their + name.removeprefix(ours) for name in expected if name.startswith(ours)}
    renamed = {name: state[theirs[name]] for name in expected if theirs.get(name) in state}
    for name in expected:  # files of torch before 0.4.1 do not count batches
        if name.endswith("num_batches_tracked"):
            renamed.setdefault(name, torch.tensor(0))
    same_shapes = {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in expected.items()}
    if not same_shapes or not state.keys() <= set(theirs.values()):
        return None
    net.load_state_dict({name: t.contiguous() for name, t in renamed.items()}, assign=True)
    return net

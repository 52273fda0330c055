"""Weights files: read, checked, and matched to a network's shapes."""

import argparse
import contextlib
import re
import zipfile
from pathlib import Path

import torch

from support.errors import ModelError


def weights_of(net):
    """Return a copy of the network's state dict as contiguous CPU tensors, the form every weights file has."""
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in net.state_dict().items()}


def load_network(kind, path, average):
    """Read a Generator or Discriminator (`kind`) for the two functions above."""
    from models import Discriminator, Generator

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
    from models import Discriminator, Generator

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

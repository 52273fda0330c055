"""Weights files: read, checked, and matched to a network by the shapes of their tensors."""

import argparse
import contextlib
import re
import zipfile
from pathlib import Path

import torch

from support.errors import UserError


def load_network(kind, other, path, average):
    """Return a network of the class `kind` with the weights of a file, a checkpoint or a run folder.

    other: the other network's class, to recognise a mix-up. average: prefer the averaged weights to the plain ones.
    Raises UserError.
    """
    path, name = Path(path), kind.__name__.lower()
    if path.is_dir():
        path = newest_weights(path, f"net{kind.__name__[0]}", average)
    candidates = list(state_dicts(read_file(path)))
    size = path.stat().st_size
    for _, state in candidates:
        if sum(t.numel() * t.element_size() for t in state.values()) > size:  # views can be of any size
            raise UserError(f"{path} claims to hold larger weights than fit into its {size:,} bytes")
    matches = [(("ema" in key.lower()) == average, match_weights(kind, state)) for key, state in candidates]
    preferred = max((match for match in matches if match[1]), key=lambda match: match[0], default=None)
    if not preferred:
        mixed_up = any(match_weights(other, state) for _, state in candidates)
        why = f"it holds a {other.__name__.lower()}" if mixed_up else "no weights in it have the shapes of one"
        raise UserError(f"{path} is not the {name} of a DCGAN: {why}")
    net = preferred[1].float().eval()
    bad = [name for name, t in net.state_dict().items() if not t.isfinite().all()]
    if bad:
        raise UserError(f"{path}: {bad[0]} has values that are not finite, since its run diverged; use an earlier file")
    return net


def newest_weights(folder, role, average):
    """Return the file of a run folder with the newest weights of "netG" or "netD": one per epoch, or the checkpoint.

    With `average`, netG_best.pth comes first if it is there: that of the epoch with the lowest Frechet distance.
    """
    if average and role == "netG" and (folder / "netG_best.pth").is_file():
        return folder / "netG_best.pth"
    by_age = []  # (finished epochs, steps after them, preference, path)
    for path in folder.glob(f"{role}*_epoch_*.pth"):
        match = re.fullmatch(rf"{role}(_ema)?_epoch_(\d+)\.pth", path.name)
        if match:
            by_age.append((int(match[2]) + 1, 0, 2 if bool(match[1]) == average else 0, path))
    for checkpoint in (folder / "checkpoint.pth", folder / "checkpoint.prev.pth"):
        with contextlib.suppress(UserError, KeyError, TypeError):  # damaged: there may be intact files beside it
            state = read_file(checkpoint)
            by_age.append((state["epoch"], state["step"], 1, checkpoint))
    if not by_age:
        raise UserError(f"{folder} holds no weights that can be read, as {role}_epoch_0.pth or checkpoint.pth")
    return max(by_age, key=lambda entry: entry[:3])[3]


def read_file(path):
    """Return what torch.save wrote to `path`, on the CPU. Raises UserError.

    It runs no code from the file, takes memory only for what the file holds, and detects every changed byte of a
    tensor.
    """
    try:
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # options are often saved beside weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            why = "it holds more than tensors and plain values, which could run code; save the state_dict() alone"
        else:
            why = "it is damaged, or not a file that torch.save wrote"
        raise UserError(f"{path} cannot be read as weights: {why}") from None


def check_archive(path):
    """Raise UserError if `path` is a zip archive, as torch.save writes, that is compressed or damaged."""
    if not zipfile.is_zipfile(path):  # an old format without checksums, or no file of torch's
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):  # could expand to any size
            raise UserError(
                f"{path} cannot be read as weights: it is a compressed archive, which torch.save never writes"
            )
        damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path} is damaged: checksum mismatch in {damaged}")


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


def match_weights(kind, state):
    """Return a network of the class `kind` with the weights of `state`, or None if the shapes do not match.

    Layers are matched by the order and the shapes of their weights, never by their names.
    """
    convolutions, norms = layers_of(state)
    if len(convolutions) < 3 or not all(state[name].is_floating_point() for name in convolutions):
        return None
    first, last, doublings = state[convolutions[0]].shape, state[convolutions[-1]].shape, len(convolutions) - 1
    try:
        with torch.device("meta"):  # shapes alone, no storage
            net = kind(**kind.arguments_from_shapes(first, last, doublings))
    except UserError:
        return None
    expected = net.state_dict()
    our_convolutions, our_norms = layers_of(expected)
    theirs = dict(zip(our_convolutions, convolutions, strict=False))
    for ours, their in zip(our_norms, norms, strict=False):
        theirs |= {name: their + name.removeprefix(ours) for name in expected if name.startswith(ours)}
    renamed = {name: state[theirs[name]] for name in expected if theirs.get(name) in state}
    for name in expected:  # files of PyTorch before 0.4.1 have no batch counts
        if name.endswith("num_batches_tracked"):
            renamed.setdefault(name, torch.tensor(0))
    same_shapes = {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in expected.items()}
    if not same_shapes or not state.keys() <= set(theirs.values()):
        return None
    net.load_state_dict({name: t.contiguous() for name, t in renamed.items()}, assign=True)
    return net

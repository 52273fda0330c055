"""Weights files: found in a run folder, read, and checked."""

import argparse
import contextlib
import re
import zipfile
from pathlib import Path

import torch

from support.cli import option_name
from support.contrast import with_contrast_factor
from support.errors import UserError
from support.matching import Mismatch, best_match, state_dicts

# Names under which settings that are saved beside weights hold the sizes of a network.
SETTINGS = {"nz": ("nz", "z_dim", "latent_dim"), "image_size": ("image_size", "imageSize", "imsize", "img_size")}

OTHER_ARCHIVES = {  # a file that only archives of another kind hold: what they are, and what to save instead
    "constants.pkl": "a TorchScript program; torch.save the state_dict() of what torch.jit.load returns",
    "archive_format": "an exported program; torch.save the state_dict of what torch.export.load returns",
}


def load_network(network_class, other_class, path, average):
    """Return a `network_class` (Generator or Discriminator) with the weights of a file, checkpoint or run folder.

    other_class: the class of the other network, to recognise a mix-up. average: prefer the averaged weights to the
    plain ones, and apply the contrast factor of a checkpoint.
    Prints what it has to assume about the network of another program. Raises UserError.
    """
    path, name = Path(path), network_class.__name__.lower()
    if path.is_dir():
        path = newest_weights(path, f"net{network_class.__name__[0]}", average)
    tree, size = read_file(path), path.stat().st_size
    states = list(state_dicts(tree))
    for _, state in states:
        if sum(t.numel() * t.element_size() for t in state.values()) > size:  # views can be of any size
            raise UserError(f"{path} claims to hold larger weights than fit into its {size:,} bytes")
    try:
        net, foreign = best_match(network_class, other_class, states, average)
    except Mismatch as mismatch:
        raise UserError(f"{path} is not the {name} of a DCGAN: {mismatch}") from None
    if foreign:
        check_settings(tree, net, path)
    net.float().eval()
    if average and isinstance(tree, dict) and isinstance(factor := tree.get("contrast_factor"), float):
        net = with_contrast_factor(net, factor)  # a checkpoint keeps the weights as they are trained
    bad = [name for name, t in net.state_dict().items() if not t.isfinite().all()]
    if bad:
        raise UserError(f"{path}: {bad[0]} has values that are not finite, since its run diverged; use an earlier file")
    if foreign:
        assumed = network_class.assumptions
        print(f"note: {path}: its layers are not named as in the public PyTorch example; assumed: {assumed}")
    return net


def check_settings(tree, net, path):
    """Raise UserError if settings saved beside the weights say other sizes than the shapes of the weights."""
    for settings in (tree, *tree.values()):
        settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
        for size, names in SETTINGS.items() if isinstance(settings, dict) else ():
            found = getattr(net, size, None)
            for name in names:
                if found and type(settings.get(name)) is int and settings[name] != found:
                    raise UserError(
                        f"{path}: its settings say {name} {settings[name]}, but its weights fit {name} {found}, with"
                        " the paper's strides; if the weights are right, save the state_dict() alone"
                    )


def check_sizes(net, args, option):
    """Raise UserError if a network that was loaded for `option`, netG or netD, has other sizes than `args` say."""
    names = ("nz", "ngf", "ndf", "nc", "image_size")
    different = [name for name in names if hasattr(net, name) and getattr(net, name) != getattr(args, name)]
    if different:
        has = " ".join(f"{option_name(name)} {getattr(net, name)}" for name in different)
        raise UserError(f"--{option} {getattr(args, option)}: its network has {has}; give the same options")


def newest_weights(folder, role, average):
    """Return the file of a run folder with the newest weights of `role`, "netG" or "netD".

    That is a weights file of an epoch, or a checkpoint if it is newer. With `average`, it is netG_best.pth if that
    exists: the weights with the lowest FID.
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
        raise UserError(f"{folder} holds no weights that can be read, such as {role}_epoch_0.pth or checkpoint.pth")
    return max(by_age, key=lambda entry: entry[:3])[3]


def read_file(path):
    """Return what torch.save wrote to `path`, on the CPU. Raises UserError.

    It runs no code from the file, and takes memory only for what the file holds. It detects every changed byte of a
    tensor, except in torch's old format, which has no checksums.
    """
    try:
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # options are often saved beside weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file or folder") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            why = "it holds more than tensors and plain values, which could run code; save the state_dict() alone"
        else:
            why = "it is damaged, or not a file that torch.save wrote"
        raise UserError(f"{path} cannot be read as weights: {why}") from None


def check_archive(path):
    """Raise UserError if `path` is of another format, or a zip archive, as torch.save writes, compressed or damaged."""
    if not zipfile.is_zipfile(path):  # an old format without checksums, or no file of torch's
        with open(path, "rb") as file:
            size, header = int.from_bytes(file.read(8), "little"), file.read(1)
        if header == b"{" and size < path.stat().st_size:
            how = "torch.save what safetensors.torch.load_file returns"
            raise UserError(f"{path} cannot be read as weights: it is a safetensors file; {how}")
        return
    with zipfile.ZipFile(path) as archive:
        for part, what in OTHER_ARCHIVES.items():
            if any(name.partition("/")[2] == part for name in archive.namelist()):
                raise UserError(f"{path} cannot be read as weights: it is {what} instead")
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):  # could expand to any size
            raise UserError(
                f"{path} cannot be read as weights: it is a compressed archive, which torch.save never writes"
            )
        damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path} is damaged: checksum mismatch in {damaged}")

"""The folder of generate.py's images: those of one generator alone, each marked with its weights."""

import hashlib
import os
import re

from support.errors import UserError


def hash_of_weights(netG):
    """Return the mark of a generator's weights: the first 16 hexadecimal digits of their SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in sorted(netG.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_weights_hash(path):
    """Return the mark with which plots.write_png wrote a file, or "": it is the first text of the PNG."""
    with open(path, "rb") as file:
        match = re.search(rb"tEXtweights\0([0-9a-f]{16})", file.read(128))
    return match[1].decode() if match else ""


def check_same_weights(outf, mark, seeds):
    """Raise UserError if the folder `outf` would then hold samples of other weights beside those of `seeds`."""
    for path in outf.iterdir() if os.path.isdir(outf) else ():  # a Path could raise instead
        number = re.fullmatch(r"seed(\d{6,})\.png", path.name)
        if number and int(number[1]) not in seeds and read_weights_hash(path) != mark:
            raise UserError(
                f"--outf {outf} holds samples of other weights, such as {path.name}; choose another --outf, or delete"
                " them first"
            )


def grid_path(outf):
    """Return where to write the grid of the samples in `outf`: beside the folder, since it is no sample.

    A folder without a name or without a place beside it holds the grid itself. Raises UserError if another file is
    there.
    """
    parent = outf.parent
    if outf.name in ("", "..") or os.path.ismount(outf) or (os.path.exists(parent) and not os.access(parent, os.W_OK)):
        return outf / "grid.png"
    path = outf.with_name(f"{outf.name}.png")
    if os.path.exists(path) and not (path.is_file() and read_weights_hash(path)):
        raise UserError(
            f"--outf {outf}: the grid would overwrite {path}, which generate.py did not write; choose another --outf"
        )
    return path

"""explore.html, a page to move through latent space with the pointer; its template is explorer.html."""

import base64
import io
import json
import string
from pathlib import Path

import torch

from support.files import write_atomically
from support.latents import SEED_COUNT, latents
from support.plots import make_grid, to_pil

PLANES = 6  # seeds, each with a plane through its latent vector
PAGE = Path(__file__).with_suffix(".html")


def plane(z, seed, across):
    """Return points of a plane through z, (nz,), scaled to z's length: row by row, z in the middle, (across**2, nz).

    The plane's two directions are random, and orthogonal to z and to each other.
    """
    generator = torch.Generator().manual_seed(SEED_COUNT - 1 - seed)  # another seed than z's own
    basis = torch.linalg.qr(torch.cat([z[:, None], torch.randn(len(z), 2, generator=generator)], 1))[0].T
    steps = torch.linspace(-1, 1, across)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    points = z / z.norm() + x.reshape(-1, 1) * basis[1] + y.reshape(-1, 1) * basis[2]
    points = points / points.norm(dim=1, keepdim=True) * z.norm()
    points[len(points) // 2] = z
    return points


def write_explorer(netG, generate, manual_seed, outf):
    """Write explore.html, a page with the images of PLANES planes, which blends those next to the pointer.

    generate: a function of (netG, z) that returns uint8 images. Returns a list with the name of the file.
    """
    across = min(17, max(5, 2304 // netG.image_size)) // 2 * 2 + 1  # an odd number
    sheets = []
    for seed in range(manual_seed, manual_seed + PLANES):
        images = generate(netG, plane(latents([seed], netG.nz)[0], seed, across))
        sheet = to_pil(make_grid(images, across))
        file, kind = io.BytesIO(), "png" if netG.image_size % 8 else "jpeg"  # a block of a JPEG would mix two images
        sheet.save(file, kind, **({"quality": 88, "subsampling": 0} if kind == "jpeg" else {}))
        data = base64.b64encode(file.getvalue()).decode()
        sheets.append({"seed": seed, "sheet": f"data:image/{kind};base64,{data}"})
    values = {"side": netG.image_size, "across": across, "sheets": sheets}
    page = string.Template(PAGE.read_text(encoding="utf-8")).substitute(values=json.dumps(values))
    write_atomically(outf / "explore.html", lambda file: file.write(page.encode()), sync=False)
    return ["explore.html"]

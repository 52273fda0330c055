"""A walk through the images between latent vectors."""

import torch

from support.files import write_atomically
from support.latents import latents
from support.plots import save_grid, to_pil

STEPS = 16  # images from one latent vector to the next; the grid shows every second


def slerp(a, b, t):
    """Return the points on the great circle from a to b, each (nz,), at the positions t in [0, 1]: (len(t), nz).

    Unlike those on a straight line, they are as far from the origin as the latent vectors that G has learned from
    (White 2016, arXiv:1609.04468).
    """
    angle = torch.acos((torch.dot(a, b) / (a.norm() * b.norm())).clamp(-1, 1))
    t = torch.as_tensor(t)[:, None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def write_walk(netG, generate, count, manual_seed, outf):
    """Walk through the latent vectors of `count` seeds and back to the first: walk.png, a row for each, and walk.gif.

    generate: a function of (netG, z) that returns uint8 images. Returns the names of the files.
    """
    ends = latents(range(manual_seed, manual_seed + count), netG.nz)
    t = [i / STEPS for i in range(STEPS)]
    z = torch.cat([torch.cat([a[None], slerp(a, b, t[1:])]) for a, b in zip(ends, ends.roll(-1, 0), strict=True)])
    images = generate(netG, z)
    save_grid(outf / "walk.png", images[::2], STEPS // 2)
    frames = [to_pil(image).quantize(256) if netG.nc == 3 else to_pil(image) for image in images]
    options = {"format": "gif", "save_all": True, "append_images": frames[1:], "duration": 60, "loop": 0}
    write_atomically(outf / "walk.gif", lambda file: frames[0].save(file, **options), sync=False)
    return ["walk.png", "walk.gif"]

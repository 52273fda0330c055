"""A walk between latents."""

import torch

from models import pictures
from support.errors import ModelError
from support.files import write_whole
from support.latents import latents
from support.plots import save_grid
from support.png import picture_of

STEPS = 16  # pictures from one latent of a walk to the next; its grid shows every second


def slerp(a, b, t):
    """Return the latents on the great circle from a to b, each (nz,), at every t in [0, 1] of a list: (len(t), nz).

    Unlike those of a straight line, they are as far from the origin as what G has learned on (White 2016,
    arXiv:1609.04468). At t = 0 it is a, bit for bit.
    """
    angle = torch.acos((torch.dot(a, b) / (a.norm() * b.norm())).clamp(-1, 1))
    t = torch.as_tensor(t)[:, None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def walk(netG, count, manual_seed, outf):
    """Walk through the latents of `count` seeds and back to the first: walk.png, a row for each, and walk.gif."""
    if netG.nz < 2:
        raise ModelError(f"--interpolate needs latents of at least 2 numbers; this generator's have {netG.nz}")
    ends = latents(range(manual_seed, manual_seed + count), netG.nz)
    t = [i / STEPS for i in range(STEPS)]
    z = torch.cat([torch.cat([a[None], slerp(a, b, t[1:])]) for a, b in zip(ends, ends.roll(-1, 0), strict=True)])
    frames = pictures(netG, z)
    save_grid(outf / "walk.png", frames[::2], STEPS // 2)
    images = [picture_of(frame).quantize(256) if netG.nc == 3 else picture_of(frame) for frame in frames]
    options = {"format": "gif", "save_all": True, "append_images": images[1:], "duration": 60, "loop": 0}
    write_whole(outf / "walk.gif", lambda file: images[0].save(file, **options))
    return "walk.png and walk.gif"

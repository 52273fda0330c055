"""A page to move through latent space."""

import base64
import io
import json
import string

import torch
from PIL import Image
from torchvision.utils import make_grid

from models import pictures
from support.errors import ModelError
from support.files import write_whole
from support.latents import SEEDS, latents

PLANES = 6  # seeds whose planes the explorer has


def plane(z, seed, across):
    """Return across**2 latents, (across**2, nz), row by row, on a plane through z, (nz,), which is in the middle.

    Its two directions are random and at right angles to z and to each other; each latent is scaled to z's length.
    """
    draw = torch.Generator().manual_seed(SEEDS - 1 - seed)  # not the seed, whose numbers z is made of
    basis = torch.linalg.qr(torch.cat([z[:, None], torch.randn(len(z), 2, generator=draw)], 1))[0].T
    steps = torch.linspace(-1, 1, across)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    points = z / z.norm() + x.reshape(-1, 1) * basis[1] + y.reshape(-1, 1) * basis[2]
    points = points / points.norm(dim=1, keepdim=True) * z.norm()
    points[len(points) // 2] = z
    return points


def explore(netG, manual_seed, outf):
    """Write explore.html: the pictures of some planes, and a page that blends those next to the pointer."""
    if netG.nz < 3:
        raise ModelError(f"--explore needs latents of at least 3 numbers; this generator's have {netG.nz}")
    across = min(17, max(5, 2304 // netG.image_size)) // 2 * 2 + 1  # an odd number
    sheets = []
    for seed in range(manual_seed, manual_seed + PLANES):
        made = pictures(netG, plane(latents([seed], netG.nz)[0], seed, across))
        sheet = Image.fromarray(make_grid(made, nrow=across, padding=0).permute(1, 2, 0).numpy())
        file = io.BytesIO()
        if netG.image_size % 8:  # the blocks of a JPEG would be of two pictures
            sheet.save(file, "png")
        else:
            sheet.save(file, "jpeg", quality=88, subsampling=0)
        sheets.append({"seed": seed, "sheet": base64.b64encode(file.getvalue()).decode()})
    values = {"side": netG.image_size, "across": across, "sheets": sheets}
    page = string.Template(PAGE).substitute(values=json.dumps(values))
    write_whole(outf / "explore.html", lambda file: file.write(page.encode()))
    return "explore.html"


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Latent space</title>
<style>
  :root { color-scheme: light dark; }
  body { margin: 0 auto; padding: 1rem; max-width: 34rem; font: 16px/1.5 system-ui, sans-serif; text-align: center; }
  #view { position: relative; max-width: 75vh; margin: auto; touch-action: none; cursor: crosshair; }
  canvas { display: block; width: 100%; border-radius: 8px; outline-offset: 3px; }
  #dot { position: absolute; width: 14px; height: 14px; margin: -8px; border: 1px solid #000; border-radius: 50%;
         background: #fffc; pointer-events: none; }
  button { margin: 0 .15rem .4rem; padding: .4rem .7rem; font: inherit; border: 1px solid #8888; border-radius: 6px;
           background: none; color: inherit; cursor: pointer; }
  button[aria-pressed=true] { background: #46d; color: #fff; }
</style>
<h1>Latent space</h1>
<p id="planes"></p>
<div id="view">
  <canvas tabindex="0" aria-label="a picture that changes as you move over it"></canvas>
  <div id="dot"></div>
</div>
<p>Move over the picture, or use the arrow keys. In the middle is the seed's own picture.</p>
<script>
const {side, across, sheets} = $values;
const view = document.getElementById("view"), dot = document.getElementById("dot");
const canvas = view.querySelector("canvas"), context = canvas.getContext("2d");
canvas.width = canvas.height = side;
let sheet = null, x = .5, y = .5;
function draw() {
  // Bilinear: the four pictures around the place, each over what is there with the share that makes it count as due.
  const column = Math.min(across - 2, Math.floor(x * (across - 1)));
  const row = Math.min(across - 2, Math.floor(y * (across - 1)));
  const right = x * (across - 1) - column, below = y * (across - 1) - row;
  let total = 0;
  for (const [i, j, weight] of [[0, 0, (1 - right) * (1 - below)], [1, 0, right * (1 - below)],
                                [0, 1, (1 - right) * below], [1, 1, right * below]]) {
    if (weight === 0) continue;
    total += weight;
    context.globalAlpha = weight / total;
    context.drawImage(sheet, (column + i) * side, (row + j) * side, side, side, 0, 0, side, side);
  }
  dot.style.left = x * 100 + "%";
  dot.style.top = y * 100 + "%";
}
function move(event) {
  const box = canvas.getBoundingClientRect();
  x = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  y = Math.min(1, Math.max(0, (event.clientY - box.top) / box.height));
  draw();
}
view.addEventListener("pointermove", move);
view.addEventListener("pointerdown", move);
canvas.addEventListener("keydown", event => {
  const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (!steps) return;
  event.preventDefault();
  x = Math.min(1, Math.max(0, x + steps[0] / 40));
  y = Math.min(1, Math.max(0, y + steps[1] / 40));
  draw();
});
sheets.forEach((plane, i) => {
  const image = new Image(), button = document.createElement("button");
  button.textContent = "seed " + plane.seed;
  button.onclick = () => {
    for (const other of document.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    sheet = image;
    draw();
  };
  document.getElementById("planes").append(button);
  image.onload = () => { if (i === 0) button.click(); };
  image.src = "data:image;base64," + plane.sheet;
});
</script>
</html>
"""

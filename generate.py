"""Sample pictures from a trained DCGAN generator, walk between them, add and subtract them.

python generate.py --load_path out --num_output 64
python generate.py --load_path out --interpolate 8
"""

import argparse
import base64
import io
import json
import re
import string
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid
from tqdm import tqdm

from models import ModelError, latents, load_generator, newest_weights, pictures
from runs import Parser, RunError, check_writable, number, pick_device, save_grid, show_any_name, tune, write_whole

GRID = 64  # pictures that grid.png shows at most
STEPS = 16  # pictures from one latent of a walk to the next; its grid shows every second
PLANES = 6  # seeds whose planes the explorer has
SEEDS = 2**32  # torch's generator knows no more


def build_parser():
    parser = Parser(prog="generate.py", description=__doc__.splitlines()[0])
    add, count, seed = parser.add_argument, number(int, 1), number(int, 0, SEEDS)
    add("--load_path", default="out", metavar="PATH", help="run folder, checkpoint or weights [%(default)s]")
    add("--num_output", type=count, default=64, metavar="N", help="how many pictures [%(default)s]")
    add("--manualSeed", dest="manual_seed", type=seed, default=0, metavar="N", help="seed of the first [%(default)s]")
    add("--interpolate", type=number(int, 2), metavar="K", help="walk through K latents and back: walk.png, walk.gif")
    add("--arithmetic", type=groups, metavar="SEEDS", help="as 1,5,9-2,4+7,8: means of latents, added: arithmetic.png")
    add("--explore", action="store_true", help="write explore.html, planes through latent space to move in")
    add("--outf", default="generated", metavar="DIR", help="folder for the pictures [%(default)s]")
    add("--batchSize", dest="batch_size", type=count, default=64, metavar="N", help="pictures at a time [%(default)s]")
    add("--cuda", action="store_true", help="run on an NVIDIA or AMD GPU")
    add("--accel", action="store_true", help="run on the accelerator that torch finds: cuda, mps, xpu")
    add("--show", action="store_true", help="show the grid in a window at the end")
    return parser


def groups(text):
    """Return [(sign, seeds), ...] of an --arithmetic: "1,5-2" is [(1, [1, 5]), (-1, [2])]."""
    if not re.fullmatch(r"\d+(,\d+)*([+-]\d+(,\d+)*)*", text):
        raise argparse.ArgumentTypeError(f"must be groups of seeds with + and - between, as 1,5,9-2,4+7,8, not {text}")
    found = re.findall(r"([+-]?)([\d,]+)", text)
    if any(int(seed) >= SEEDS for seed in re.findall(r"\d+", text)):
        raise argparse.ArgumentTypeError(f"must be of seeds below {SEEDS}, not {text}")
    return [(-1 if sign == "-" else 1, [int(seed) for seed in seeds.split(",")]) for sign, seeds in found]


def picture_of(pixels):
    """Return a PIL image of a picture, uint8 (nc, s, s), nc 1 or 3."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())


def write_png(path, picture):
    image = picture_of(picture)
    # Level 4 makes files as small as the usual 6, in two thirds of the time.
    write_whole(path, lambda file: image.save(file, "png", compress_level=4), sync=False)


def generate(netG, num_output, manual_seed, batch_size, outf):
    """Write picture k from seed manual_seed + k as outf/seed000042.png; return the first GRID of them, uint8."""
    first = []
    seeds = range(manual_seed, manual_seed + num_output)
    with ThreadPoolExecutor() as pool, tqdm(total=num_output, unit="img", disable=None) as bar:
        for start in range(0, num_output, batch_size):
            part = seeds[start : start + batch_size]
            batch = pictures(netG, latents(part, netG.nz))
            list(pool.map(write_png, [outf / f"seed{seed:06d}.png" for seed in part], batch))
            first += batch[: max(0, GRID - start)]
            bar.update(len(part))
    return torch.stack(first[:GRID])


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


def arithmetic(netG, terms, outf):
    """Draw the members of each group, above the picture of their mean latent, and the sum of the means at the end.

    As in figure 7 of the DCGAN paper, which found the mean of three to be steady where single ones are not.
    """
    members = [latents(seeds, netG.nz) for _, seeds in terms]
    means = [group.mean(0) for group in members]
    result = means[0]
    for (sign, _), mean in zip(terms[1:], means[1:], strict=True):
        result = result + sign * mean
    made = iter(pictures(netG, torch.cat([*members, torch.stack([*means, result])])))

    side = max(96, netG.image_size)
    gap, line = side * 11 // 24, side * 11 // 48  # pixels: between columns, of a line of text
    font, tallest = ImageFont.load_default(side // 6), max(len(seeds) for _, seeds in terms)
    size = (gap + (len(terms) + 1) * (side + gap), (tallest + 1) * (side + line) + 3 * line)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)

    def put(column, top, picture, text, symbol=""):
        left = gap + column * (side + gap)
        canvas.paste(picture_of(picture).convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (left, top))
        draw.text((left + side / 2, top + side + line / 2), text, "black", font, "mm")
        x, y, reach = left - gap / 2, top + side / 2, side // 14
        for height in {"-": [0], "+": [0], "=": [-0.5, 0.5]}.get(symbol, []):
            draw.line((x - reach, y + height * reach, x + reach, y + height * reach), "black", side // 40)
        if symbol == "+":
            draw.line((x, y - reach, x, y + reach), "black", side // 40)

    for column, (_, seeds) in enumerate(terms):
        for i, seed in enumerate(seeds):  # the last stands just above the mean
            put(column, line // 2 + (tallest - len(seeds) + i) * (side + line), next(made), f"seed {seed}")
    bottom = tallest * (side + line) + 2 * line
    draw.line((gap / 2, bottom - line, size[0] - gap / 2, bottom - line), "gray")
    for column, (sign, _) in enumerate(terms):
        put(column, bottom, next(made), "mean", "" if column == 0 else "+" if sign > 0 else "-")
    put(len(terms), bottom, next(made), "result", "=")
    write_whole(outf / "arithmetic.png", lambda file: canvas.save(file, "png"))
    return "arithmetic.png"


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


def main(argv=None):
    show_any_name()
    parser = build_parser()
    args = parser.parse_args(argv)
    outf, wanted = Path(args.outf), max(args.num_output, args.interpolate or 0)
    if args.manual_seed + wanted > SEEDS:
        parser.error(f"--manualSeed {args.manual_seed}: the last seed is {SEEDS - 1}, and {wanted} are wanted")
    try:
        device = pick_device(args.cuda, args.accel)
        tune(device)
        path = Path(args.load_path)
        path = newest_weights(path, "netG", average=True) if path.is_dir() else path
        netG = load_generator(path).to(device)
        if netG.nc not in (1, 3):
            raise ModelError(f"{args.load_path} makes pictures of {netG.nc} channels; PNG files have 1 or 3")
        check_writable(outf)
        outf.mkdir(parents=True, exist_ok=True)
        made = make(netG, args, outf)
    except (ModelError, RunError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"generate.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"generate.py: interrupted; the pictures in {outf} are whole\n")
    print(f"{' and '.join(made)} in {outf}, from {path}")
    grids = [name for name in " ".join(made).split() if name.endswith(".png")]
    if args.show and grids:
        show(outf / grids[0])


def make(netG, args, outf):
    """Write what is asked for into `outf`; return what to call it."""
    made = []
    if args.interpolate:
        made.append(walk(netG, args.interpolate, args.manual_seed, outf))
    if args.arithmetic:
        made.append(arithmetic(netG, args.arithmetic, outf))
    if args.explore:
        made.append(explore(netG, args.manual_seed, outf))
    if not made:
        save_grid(outf / "grid.png", generate(netG, args.num_output, args.manual_seed, args.batch_size, outf))
        made.append(f"{args.num_output} pictures of {netG.image_size} x {netG.image_size} and grid.png")
    return made


def show(path):
    import matplotlib.pyplot as plt

    plt.imshow(Image.open(path))
    plt.axis("off")
    plt.show()


if __name__ == "__main__":
    sys.exit(main())

"""Sample pictures from a trained DCGAN generator, walk between them, add and subtract them.

python generate.py --load_path out --num_output 64
python generate.py --load_path out --interpolate 8
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from models import load_generator, pictures
from support.accelerator import pick_device, tune
from support.arithmetic import arithmetic, groups
from support.cli import Parser, number, show_any_name
from support.errors import ModelError, RunError
from support.explorer import explore
from support.files import check_writable
from support.latents import SEEDS, latents
from support.plots import save_grid
from support.png import write_png
from support.walk import walk
from support.weights import newest_weights

GRID = 64  # pictures that grid.png shows at most


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

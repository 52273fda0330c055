"""Generate images with a trained DCGAN; walk between latent vectors, add and subtract them.

python generate.py --load_path out --num_output 64
python generate.py --load_path out --interpolate 8
"""

from support.signals import interrupt_quietly

if __name__ == "__main__":
    interrupt_quietly(True)  # while the imports below take their seconds

import sys
from concurrent.futures import ThreadPoolExecutor
from os.path import expanduser
from pathlib import Path

import torch
from tqdm import tqdm

from models import generate_images, latents, load_generator
from support.accelerator import is_out_of_memory, pick_device, tune_device
from support.arithmetic import seed_groups, write_arithmetic
from support.cli import Parser, check_options_have_effect, number, protect_output
from support.errors import UserError, counted
from support.explorer import PLANES, write_explorer
from support.files import check_writable, make_folder
from support.latents import SEED_COUNT
from support.plots import save_grid, write_png
from support.samples import check_same_weights, grid_path, hash_of_weights
from support.walk import write_walk
from support.weights import newest_weights

MAX_GRID_IMAGES = 64


def build_parser():
    description = "Generate images with a trained DCGAN; walk between latent vectors, add and subtract them."
    parser = Parser(prog="generate.py", description=description)
    add, count, seed = parser.add_argument, number(int, 1), number(int, 0, SEED_COUNT)
    text = "run folder, checkpoint or weights (default: %(default)s)"
    add("--load_path", type=expanduser, default="out", metavar="PATH", help=text)
    add("--num_output", type=count, default=64, metavar="N", help="number of images (default: %(default)s)")
    add("--manualSeed", dest="manual_seed", type=seed, default=0, metavar="N", help="first seed (default: %(default)s)")
    add("--interpolate", type=number(int, 2), metavar="K", help="walk between K latent vectors: walk.png, walk.gif")
    text = "add and subtract means of latent vectors: 1,5-2,4 is the mean of seeds 1 and 5 minus that of 2 and 4;"
    text += " writes arithmetic.png"
    add("--arithmetic", type=seed_groups, metavar="SEEDS", help=text)
    text = "write explore.html, a page to move through latent space with the pointer"
    add("--explore", action="store_true", help=text)
    add("--outf", type=expanduser, default="generated", metavar="DIR", help="output folder (default: %(default)s)")
    text = "images to write at a time (default: %(default)s)"
    add("--batchSize", dest="batch_size", type=count, default=64, metavar="N", help=text)
    add("--cuda", action="store_true", help="run on an NVIDIA or AMD GPU")
    add("--accel", action="store_true", help="run on the accelerator that torch finds: cuda, mps, xpu")
    add("--show", action="store_true", help="at the end, show the grid (or walk.png, arithmetic.png) in a window")
    return parser


def main(argv=None):
    """Sample as the command line `argv` asks. Exits with 2 if it cannot work, 1 if writing fails, 130 after Ctrl-C."""
    parser = build_parser()
    args, typed = parser.parse_args(argv), parser.typed_options(argv)
    outf = Path(args.outf)
    only_samples = not (args.interpolate or args.arithmetic or args.explore)
    seeds = args.num_output if only_samples else max(args.interpolate or 0, PLANES if args.explore else 0)
    if args.manual_seed + seeds > SEED_COUNT:
        parser.error(f"--manualSeed {args.manual_seed}: the last seed is {SEED_COUNT - 1}, and {seeds} are needed")
    try:
        check_options_have_effect(typed, options_without_effect(typed))
        device = pick_device(args.cuda, args.accel)
        tune_device(device)
        if args.accel and device.type == "cpu":
            print("warning: --accel: torch finds no accelerator; this runs on the CPU", file=sys.stderr)
        path = Path(args.load_path)
        if not path.exists():
            raise UserError(
                f"--load_path {path}: there is no such file or folder; media/faces.pth holds trained weights"
            )
        path = newest_weights(path, "netG", average=True) if path.is_dir() else path
        netG = load_generator(path)
        if netG.nc not in (1, 3):
            raise UserError(f"{args.load_path} generates images of {netG.nc} channels; PNG files have 1 or 3")
        for option, least in (("interpolate", 2), ("explore", 3)):
            if getattr(args, option) and netG.nz < least:
                raise UserError(f"--{option} needs a generator with latent vectors of length {least} or more")
        check_writable(outf)
        write = write_samples_and_grid if only_samples else write_figures
        written, shown = write(netG, args, device)
    except UserError as error:
        parser.error(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "" if device.type == "cpu" else "; leave out --cuda or --accel to use the CPU"
        parser.exit(1, f"generate.py: out of memory on {device}{advice}\n")
    except OSError as error:
        parser.exit(1, f"generate.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"generate.py: interrupted; the images in {outf} are intact\n")
    print(f"{written}, from {path}")
    if args.show and shown:
        show(shown)


def options_without_effect(typed):
    """Return a table for check_options_have_effect of the options that can have no effect."""
    figures = [name for name in ("interpolate", "arithmetic", "explore") if name in typed]
    no_samples = f"--{figures[0]} writes no single images" if figures else ""
    return (  # option, whether it has no effect, why
        ("num_output", figures, no_samples),
        ("batch_size", figures, no_samples),
        ("manual_seed", figures == ["arithmetic"], "--arithmetic names its seeds"),
        ("show", figures == ["explore"], "open explore.html in a browser"),
    )


def write_figures(netG, args, device):
    """Write the figures asked for; return (text naming the files and their folder, path of the first PNG or None)."""
    outf, names = Path(args.outf), []
    make_folder(outf)
    netG.to(device)
    if args.interpolate:
        names += write_walk(netG, generate_images, args.interpolate, args.manual_seed, outf)
    if args.arithmetic:
        names += write_arithmetic(netG, generate_images, args.arithmetic, outf)
    if args.explore:
        names += write_explorer(netG, generate_images, args.manual_seed, outf)
    first = next((outf / name for name in names if name.endswith(".png")), None)
    return f"{' and '.join(names)} in {outf}", first


def write_samples_and_grid(netG, args, device):
    """Write the samples, and beside their folder a grid of the first; return (text naming both, path of the grid).

    Raises UserError if the folder would then hold samples of several generators.
    """
    outf, weights_hash = Path(args.outf), hash_of_weights(netG)
    seeds = range(args.manual_seed, args.manual_seed + args.num_output)
    grid = grid_path(outf)
    check_same_weights(outf, weights_hash, seeds)
    make_folder(outf)
    first = write_samples(netG.to(device), seeds, args.batch_size, outf, weights_hash)
    save_grid(grid, first, weights_hash=weights_hash)
    old = outf / "grid.png"
    if grid != old and old.exists():
        print(f"note: {old} was written by an earlier version; delete it, or other programs will read it as a sample")
    return f"{counted(args.num_output, 'image')} of {netG.image_size} x {netG.image_size} in {outf}, and {grid}", grid


def write_samples(netG, seeds, batch_size, outf, weights_hash):
    """Write the image of each seed of a range as outf/seed000042.png, with the hash of the weights in it.

    Returns the first images, uint8 (N, nc, image_size, image_size), N at most MAX_GRID_IMAGES.
    """
    first = []
    with ThreadPoolExecutor() as pool, tqdm(total=len(seeds), unit="img", disable=None) as bar:
        for start in range(0, len(seeds), batch_size):
            batch_seeds = seeds[start : start + batch_size]
            images = generate_images(netG, latents(batch_seeds, netG.nz))
            paths = [outf / f"seed{seed:06d}.png" for seed in batch_seeds]
            list(pool.map(write_png, paths, images, [weights_hash] * len(paths)))
            first += images[: max(0, MAX_GRID_IMAGES - start)]
            bar.update(len(images))
    return torch.stack(first[:MAX_GRID_IMAGES])


def show(path):
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":  # matplotlib's choice without a display or a toolkit for windows
        print(f"warning: --show: matplotlib cannot open a window here; open {path}", file=sys.stderr)
        return
    plt.imshow(plt.imread(path), cmap="gray", vmin=0, vmax=1)
    plt.axis("off")
    plt.show()


if __name__ == "__main__":
    interrupt_quietly(False)
    protect_output()
    sys.exit(main())

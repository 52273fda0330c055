"""Sample pictures from a trained DCGAN generator.

python generate.py --load_path out --num_output 64
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from models import ModelError, latents, load_generator, pictures
from runs import Parser, RunError, check_writable, number, pick_device, save_grid, tune, write_whole

GRID = 64  # pictures that grid.png shows at most


def build_parser():
    parser = Parser(prog="generate.py", description=__doc__.splitlines()[0])
    add, count, seed = parser.add_argument, number(int, 1), number(int, 0, 2**63)
    add("--load_path", default="out", metavar="PATH", help="run folder, checkpoint or weights [%(default)s]")
    add("--num_output", type=count, default=64, metavar="N", help="how many pictures [%(default)s]")
    add("--manualSeed", dest="manual_seed", type=seed, default=0, metavar="N", help="seed of the first [%(default)s]")
    add("--outf", default="generated", metavar="DIR", help="folder for the pictures [%(default)s]")
    add("--batchSize", dest="batch_size", type=count, default=64, metavar="N", help="pictures at a time [%(default)s]")
    add("--cuda", action="store_true", help="run on an NVIDIA or AMD GPU")
    add("--accel", action="store_true", help="run on the accelerator that torch finds: cuda, mps, xpu")
    add("--show", action="store_true", help="show the grid in a window at the end")
    return parser


def write_png(path, picture):
    """Write a picture, uint8 (nc, s, s), nc 1 or 3."""
    image = Image.fromarray(picture.permute(1, 2, 0).squeeze(2).numpy())
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


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # names that a terminal cannot show end no run
    parser = build_parser()
    args = parser.parse_args(argv)
    outf = Path(args.outf)
    try:
        device = pick_device(args.cuda, args.accel)
        tune(device)
        netG = load_generator(args.load_path).to(device)
        if netG.nc not in (1, 3):
            raise ModelError(f"{args.load_path} makes pictures of {netG.nc} channels; PNG files have 1 or 3")
        check_writable(outf)
    except (ModelError, RunError) as error:
        parser.error(str(error))
    try:
        outf.mkdir(parents=True, exist_ok=True)
        save_grid(outf / "grid.png", generate(netG, args.num_output, args.manual_seed, args.batch_size, outf))
    except (RunError, OSError) as error:
        parser.exit(1, f"generate.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"generate.py: interrupted; the pictures in {outf} are whole\n")
    print(f"{args.num_output} pictures of {netG.image_size} x {netG.image_size} and grid.png in {outf}")
    if args.show:
        show(outf / "grid.png")


def show(path):
    import matplotlib.pyplot as plt

    plt.imshow(Image.open(path))
    plt.axis("off")
    plt.show()


if __name__ == "__main__":
    sys.exit(main())

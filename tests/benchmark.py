"""Measure this program against a plainly written DCGAN of the kind that people run today.

python tests/benchmark.py          # about 20 minutes on two CPU cores
python tests/benchmark.py --cuda

Every row is a ratio of two speeds taken in turns, each contender in a process of its own: the median over the rounds,
the lowest and the highest. The reference is ImageFolder and torchvision's transforms in a DataLoader of two processes,
float32, contiguous tensors, sigmoid and BCELoss, D's own gradients in G's step too, an Adam that is not fused, and
.item() at every step.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision import datasets, transforms
from torchvision.datasets.folder import default_loader

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import PreparedImages, load_images
from generate import write_samples
from models import Discriminator, Generator, generate_images
from support.accelerator import free_memory, tune_device
from support.decoding import ImageDecoder
from support.distributed import init_distributed
from support.image_folder import FolderSource
from support.latents import latents
from support.plots import write_png
from training import Trainer, TrainerSettings

BATCH, SIZE, PHOTOGRAPHS, SOME = 128, 64, 1_536, 512
NORMALIZE = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TRANSFORM = transforms.Compose([transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor(), NORMALIZE])


def timed(device, work):
    """Return speed(): call work(), which returns how many images it did, and return images per second."""

    def speed():
        start = time.perf_counter()
        count = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return count / (time.perf_counter() - start)

    return speed


# The reference


def reference_networks(device):
    nets = [Generator().to(device), Discriminator().to(device)]
    return *nets, *(torch.optim.Adam(net.parameters(), lr=0.0002, betas=(0.5, 0.999)) for net in nets)


def reference_train(netG, netD, optimizerG, optimizerD, real):
    criterion, label = nn.BCELoss(), torch.ones(len(real), device=real.device)
    netD.zero_grad()
    output = netD(real)
    errD_real = criterion(output, label)
    errD_real.backward()
    D_x = output.mean().item()
    fake = netG(torch.randn(len(real), 100, 1, 1, device=real.device))
    output = netD(fake.detach())
    errD_fake = criterion(output, torch.zeros_like(label))
    errD_fake.backward()
    D_G_z1 = output.mean().item()
    optimizerD.step()
    netG.zero_grad()
    output = netD(fake)
    errG = criterion(output, label)
    errG.backward()
    D_G_z2 = output.mean().item()
    optimizerG.step()
    return (errD_real + errD_fake).item(), errG.item(), D_x, D_G_z1, D_G_z2


def reference_step(device, folder, steps):
    networks, real = reference_networks(device), torch.rand(BATCH, 3, SIZE, SIZE, device=device) * 2 - 1

    def work():
        for _ in range(steps):
            reference_train(*networks, real)
        return steps * BATCH

    return timed(device, work)


def reference_epoch(device, folder):
    networks = reference_networks(device)
    loader = DataLoader(datasets.ImageFolder(folder, TRANSFORM), BATCH, shuffle=True, num_workers=2)

    def work():
        for real, _ in loader:
            reference_train(*networks, real.to(device))
        return len(loader.dataset)

    return timed(device, work)


def reference_transform(device, folder):
    """Make batches on one core."""
    torch.set_num_threads(1)
    paths = sorted(Path(folder).rglob("*.jpg"))[:SOME]

    def work():
        for i in range(0, SOME, BATCH):
            default_collate([(TRANSFORM(default_loader(path)), 0) for path in paths[i : i + BATCH]])
        return SOME

    return timed(device, work)


# This program


def trainer_on(device, precision, compiled):
    tune_device(device)
    world_size = init_distributed()[1]
    settings = TrainerSettings(precision=precision, compile=compiled, shard_size=BATCH // world_size)
    torch.manual_seed(0)
    return Trainer(Generator(), Discriminator(), device, settings)


def our_step(device, folder, steps, precision, compiled=False):
    trainer = trainer_on(device, precision, compiled)
    batch = torch.randint(0, 256, (BATCH // trainer.world_size, 3, SIZE, SIZE), dtype=torch.uint8, device=device)

    def work():
        for _ in range(steps):
            trainer.step(batch)
        return steps * len(batch)

    return timed(device, work)


def epochs_of(images, trainer, device, steps):
    """Return speed(): the next epoch of `images`, or its first `steps` steps."""
    if device.type != "cpu":
        images.cache_on(device, free_memory(device))
    epochs = iter(range(1_000_000))

    def work():
        seen = 0
        for i, batch in enumerate(images.batches(BATCH, seed=1, epoch=next(epochs))):
            if i == steps:
                break
            trainer.step(batch)
            seen += len(batch)
        return seen

    return timed(device, work)


def our_epoch(device, folder, precision):
    with contextlib.redirect_stdout(sys.stderr):
        images = load_images("folder", folder, SIZE, cache=f"{folder}-cache", workers=2)
    return epochs_of(images, trainer_on(device, precision, False), device, steps=None)


def our_transform(device, folder):
    torch.set_num_threads(1)
    prepared = ImageDecoder(FolderSource(folder), SIZE, 3)

    def work():
        for i in range(0, SOME, BATCH):
            prepared.collate([prepared[k] for k in range(i, i + BATCH)])
        return SOME

    return timed(device, work)


def grown(device, folder, count, precision, steps):
    """Train from a prepared array of `count` images."""
    path, some = f"{folder}-{count}.npy", np.random.default_rng(0).integers(0, 256, (1000, 3, SIZE, SIZE), np.uint8)
    rows = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 3, SIZE, SIZE))
    for i in range(0, count, len(some)):
        rows[i : i + len(some)] = some
    rows.flush()
    del rows, some
    return epochs_of(
        PreparedImages(np.load(path, mmap_mode="r"), [], []), trainer_on(device, precision, False), device, steps
    )


def sampling(device, folder, what, count):
    tune_device(device)
    netG, outf = Generator().to(device).eval(), Path(f"{folder}-samples")
    outf.mkdir(exist_ok=True)
    z = latents(range(count), netG.nz)
    images = generate_images(netG, z[:SOME])

    def encode():
        for image in images:
            write_png(outf / "one.png", image)
        return len(images)

    def files():
        write_samples(netG, range(SOME), 64, outf, "")
        return SOME

    return timed(device, {"network": lambda: len(generate_images(netG, z)), "encoder": encode, "files": files}[what])


def limit(device, folder, precision):
    """Return speed() of a step that were nothing but PyTorch's convolutions, and only those gradients that it needs."""
    tune_device(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    parts = []  # (times a step, the same work in each layout)
    for net, x in ((Generator(), torch.randn(BATCH, 100, 1, 1)), (Discriminator(), torch.randn(BATCH, 3, SIZE, SIZE))):
        for layer in net.main:
            with torch.no_grad():
                y = layer(x)
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                first = layer is net.main[0]
                if isinstance(net, Generator):
                    times = [(1, "forward", None), (1, "backward", [not first, True, False])]
                else:  # D sees real and fake to learn itself, and fake again to teach G
                    times = [(3, "forward", None), (2, "backward", [not first, True, False])]
                    times += [(1, "backward", [True, False, False])]
                parts += [(n, convolution(layer, x, y, dtype, device, kind, mask)) for n, kind, mask in times]
            x = y

    def speed():
        return BATCH / sum(times * min(seconds(work, device) for work in layouts) for times, layouts in parts)

    return speed


def convolution(layer, x, y, dtype, device, kind, mask):
    """Return, for each layout, a function that computes the layer's output, or its gradients in `mask`."""
    works = []
    for layout in (torch.channels_last, torch.contiguous_format):
        ours = {"dtype": dtype, "device": device, "memory_format": layout}
        t, g, w = (tensor.detach().to(**ours) for tensor in (x, y, layer.weight))
        shape = (layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups)
        if kind == "forward":
            works.append(lambda t=t, w=w, s=shape: torch.ops.aten.convolution(t, w, None, *s))
        else:
            works.append(lambda g=g, t=t, w=w, s=shape: torch.ops.aten.convolution_backward(g, t, w, None, *s, mask))
    return works


def seconds(work, device):
    """Return the time that work() takes, the median of three."""
    repeats = 20 if device.type == "cuda" else 1
    speed = timed(device, lambda: [work() for _ in range(repeats)] and repeats)
    speed()
    return 1 / statistics.median(speed() for _ in range(3))


# The table


class Contender:
    """One of the functions above in a process of its own, or in several with one thread each."""

    def __init__(self, device, folder, function, *detail, processes=1):
        request = json.dumps([str(device), folder, function.__name__, detail])
        command, pipes = [sys.executable, __file__, "--contender", request], {"stdin": -1, "stdout": -1, "text": True}
        with socket.socket() as free:
            free.bind(("localhost", 0))
            job = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
        job |= {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
        jobs = [os.environ | job | {"RANK": str(rank)} for rank in range(processes)]
        self.processes = [subprocess.Popen(command, env=environment, **pipes) for environment in jobs]
        self.speed()  # the first time, libraries choose their kernels

    def speed(self):
        for process in self.processes:
            print("go", file=process.stdin, flush=True)
        return sum(float(process.stdout.readline()) for process in self.processes)

    def anonymous_memory(self):
        """Return megabytes of memory that are no file's, at this moment."""
        status = Path(f"/proc/{self.processes[0].pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait()


def contend(request):
    device, folder, function, detail = json.loads(request)
    speed = globals()[function](torch.device(device), folder, *detail)
    for _ in sys.stdin:
        print(speed(), flush=True)


def row(title, rounds, ours, reference):
    """Print a line of the table: the speed of one Contender against another's, in turns."""
    speeds = [(ours.speed(), reference.speed()) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in speeds)
    mine, other = (statistics.median(column) for column in zip(*speeds, strict=True))
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
    print(f"| {title} | {mine:,.0f} | {other:,.0f} | {spread} |", flush=True)


def photographs(folder):
    """Write made-up JPEGs of 178 x 218: smooth shapes with a little noise, about 10 KB each, like photographs."""
    random = np.random.default_rng(0)
    for i in range(PHOTOGRAPHS):
        coarse = Image.fromarray(random.integers(0, 256, (9, 7, 3), np.uint8)).resize((178, 218), Image.BICUBIC)
        noisy = np.asarray(coarse) + random.normal(0, 6, (218, 178, 1))
        path = Path(folder, "class", f"{i:06d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def machine(device):
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].splitlines()[0]
    gpu = f"{torch.cuda.get_device_name()}, " if device.type == "cuda" else ""
    return f"{gpu}{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", action="store_true", help="measure on an NVIDIA GPU")
    parser.add_argument("--rounds", type=int, default=9, help="turns that every row takes [%(default)s]")
    parser.add_argument(
        "--rows", default="step,epoch,prepare,sample,limit,growth,processes", help="which [%(default)s]"
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args.contender)
        return
    device = torch.device("cuda" if args.cuda else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        photographs(f"{folder}/photographs")
        print(machine(device))
        print("\n| | images/s | reference | ratio (lowest - highest) |\n| --- | --- | --- | --- |")
        table(device, f"{folder}/photographs", args.rounds, args.rows.split(","))


def table(device, folder, rounds, rows):
    def contender(function, *detail, processes=1):
        return Contender(device, folder, function, *detail, processes=processes)

    steps = 1 if device.type == "cpu" else 500
    if "step" in rows or "limit" in rows:
        with contender(reference_step, 1 if device.type == "cpu" else 100) as reference:
            for precision in ("fp32", "bf16"):
                for compiled in (False, True):
                    title = f"step, {precision}{' + --compile' if compiled else ''}"
                    with contender(our_step, steps, precision, compiled) as ours:
                        row(f"{title}, against the reference", rounds, ours, reference)
                        if "limit" in rows and not compiled:
                            with contender(limit, precision) as most:
                                row(f"{title}, against PyTorch's convolutions alone", rounds, ours, most)
    if "epoch" in rows:
        with contender(reference_epoch) as reference:
            for precision in ("fp32", "bf16"):
                with contender(our_epoch, precision) as ours:
                    row(f"from JPEGs, second epoch on, {precision}", rounds, ours, reference)
    if "prepare" in rows:
        with contender(our_transform) as ours, contender(reference_transform) as reference:
            row("preparing images, one core", rounds, ours, reference)
    if "sample" in rows:
        count = SOME if device.type == "cpu" else 65_536
        with contender(sampling, "files", count) as ours:
            for what in ("network", "encoder"):
                with contender(sampling, what, count) as part:
                    row(f"generate.py, against its {what} alone", rounds, ours, part)
    if "processes" in rows and device.type == "cpu":
        with contender(our_step, 1, "fp32", processes=2) as two, contender(our_step, 1, "fp32") as one:
            row(f"step, two processes of one thread, against one of {torch.get_num_threads()}", rounds, two, one)
    if "growth" in rows:
        precision = "fp32" if device.type == "cpu" else "bf16"
        with contender(grown, 2_000, precision, steps) as small:
            for count in (20_000, 200_000):
                with contender(grown, count, precision, steps) as large:
                    row(f"{count:,} prepared images, against 2,000", rounds, large, small)
                    more = large.anonymous_memory() - small.anonymous_memory()
                    print(f"| the same, anonymous memory | {more:+.0f} MB | | |")


if __name__ == "__main__":
    main()

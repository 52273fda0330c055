"""What several test files share: runs of the two programs, small networks and images, comparisons, references."""

import contextlib
import csv
import hashlib
import io
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch import nn
from torchvision import transforms
from tqdm import tqdm

import dcgan
import generate
from data import load_images
from models import Discriminator, Generator, generate_images, load_generator
from support import plots, run_folder
from support.errors import UserError
from support.latents import latents
from support.matmul_convolutions import as_matmul
from training import Trainer, TrainerSettings

ROOT = Path(__file__).parents[1]
IMAGES, BATCH, EPOCHS = 1000, 16, 3  # of RUN: 63 steps an epoch, the last with 8 images
SMALL = "--dataset fake --imageSize 16 --nz 10 --ngf 8 --ndf 8"
RUN = f"{SMALL} --workers 0 --log-every 20 --manualSeed 3 --batchSize {BATCH} --niter {EPOCHS}".split()
FOLDER = SMALL.replace("fake", "folder").split()
EXACT = ("netG", "netD", "netG_ema", "optimizerG", "optimizerD", "noise", "steps", "epoch", "step", "contrast_factor")
NZ, SIZE = 10, 16  # of `networks`


# Programs


def start(folder, program, *arguments, **environment):
    """Start a program in `folder`, with its cache beside the folder."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder.parent / "cache")} | environment
    command = [sys.executable, str(ROOT / program), *map(str, arguments)]
    folder.mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def finish(process, code=0, seconds=100):
    """Wait for a process, check its exit code, and return what it wrote to standard error."""
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == code, output + errors
    assert "Traceback" not in errors, errors
    return errors


def wait_for(condition, process):
    """Wait until condition() is true; fail after a minute, or if the process ends."""
    for _ in range(20_000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.003)
    pytest.fail("nothing happened for a minute")


def children(pid):
    """Return the process ids of a process's children."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended; another has its children now
            found += map(int, path.read_text().split())
    return sorted(found)


def is_alive(pid):
    """Return whether a process runs: it exists, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def run_dcgan(folder, *arguments):
    """Run dcgan.py in this process with `folder` as its run folder; return its exit code."""
    cache = [] if "--cache" in arguments else ["--cache", folder.parent / "cache" / "dcgan"]
    return dcgan.main([str(argument) for argument in ("--outf", folder, *cache, *arguments)])


def run_generate(path, *arguments):
    """Run generate.py in this process with the weights `path`; return its output folder, "generated" beside them."""
    folder = path.parent / "generated"
    generate.main([str(argument) for argument in ("--load_path", path, "--outf", folder, *arguments)])
    return folder


def fork(function, *arguments, **options):
    """Call a function in a forked process; return the process, whose exit code is 1 if the function raises."""
    process = multiprocessing.get_context("fork").Process(target=call_alone, args=(function, arguments, options))
    process.start()
    return process


def call_alone(function, arguments, options):
    """Call a function in a forked process, without tqdm's lock, which the process could be killed with in hand."""
    tqdm.set_lock(threading.RLock())
    function(*arguments, **options)


def run_dcgan_forked(folder, *arguments, **environment):
    """Be a forked process that runs dcgan.py in the new `folder`; what it says is in the files output and errors."""
    folder.mkdir()
    for stream, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - as long as the process, and not pytest's
    os.environ |= {"XDG_CACHE_HOME": str(folder.parent / "cache")} | environment
    os.chdir(folder)
    run_folder.plot_losses = plots.plot_losses  # conftest.py has replaced it
    sys.exit(dcgan.main([str(argument) for argument in arguments]))


def assert_refused(call, capsys, words):
    """Check that the call ends with 2 and one line on standard error that holds `words`."""
    try:
        code = call()
    except SystemExit as end:
        code = end.code
    errors = capsys.readouterr().err
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.endswith("\n")
    assert words in errors


# Run folders


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def hashes(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files(folder)}


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def log_rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def tensors_of(tree, name=""):
    """Return {path: tensor} of all that a nested state holds; None becomes -1."""
    if not isinstance(tree, dict | list | tuple):
        return {name: torch.as_tensor(-1.0 if tree is None else tree)}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: t for key, value in items for path, t in tensors_of(value, f"{name}/{key}").items()}


def equal(state, other):
    """Return whether two state dicts are equal bit for bit."""
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def assert_same(state, expected):
    """Check that two nested states are equal bit for bit."""
    state, expected = tensors_of(state), tensors_of(expected)
    assert state.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert different == []


def assert_same_run(folder, expected):
    """Check that two runs' checkpoints are equal bit for bit in all that training changes."""
    assert_same(*({part: checkpoint(f)[part] for part in EXACT} for f in (folder, expected)))


# Networks


def networks(seed=0):
    """Return a small generator and discriminator in float32, initialised under the seed."""
    torch.manual_seed(seed)
    return Generator(NZ, 8, 3, SIZE), Discriminator(8, 3, SIZE)


def random_batches(count, size=6, seed=3):
    """Return `count` batches of uint8 images, (size, 3, SIZE, SIZE)."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (size, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw) for _ in range(count)]


def small_trainer(seed=0, **settings):
    """Return a Trainer of `networks`, in fp32, the two innermost layers of each are matrix products."""
    settings = TrainerSettings(**({"lr": 0.002, "ema": 0.9, "seed": 7} | settings))
    trainer = Trainer(*networks(seed), torch.device("cpu"), settings)
    if settings.precision == "fp32" and not settings.compile:
        for net, place in ((trainer.netG, 3), (trainer.netD, 2)):
            net.main[place] = as_matmul(net.main[place])
    return trainer


def randomised(net, seed=0):
    """Return the network with other values in every tensor, so that no two layers can be mistaken for each other."""
    draw = torch.Generator().manual_seed(seed)
    for tensor in net.state_dict().values():
        kernel = tensor.dim() == 4
        values = torch.randn(tensor.shape, generator=draw) * 0.1 if kernel else torch.rand(tensor.shape, generator=draw)
        tensor.copy_(values if kernel else values + 1)  # a variance is positive
    return net


class Public(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x)


def public_generator(nz, ngf, nc):
    """Return the generator of pytorch/examples dcgan/main.py, layer for layer."""
    layers = [nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 8), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 4), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 2), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf), nn.ReLU(True)]
    return Public([*layers, nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()])


def public_discriminator(ndf, nc):
    """Return the discriminator of pytorch/examples dcgan/main.py, layer for layer; its output is (N, 1, 1, 1)."""
    layers = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 2), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 4), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 8), nn.LeakyReLU(0.2)]
    return Public([*layers, nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid()])


# Images


def noise(width=20, height=24, mode="RGB", seed=0):
    """Return a PIL image of random pixels."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def write_images(root, *names):
    """Write a different image under each name below `root`; return their paths."""
    paths = [Path(root) / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed=zlib.crc32(os.fsencode(path))).save(path)
    return paths


def torchvision_pixels(image, size, nc=3):
    """Return what torchvision makes of a PIL image: resized, cropped, (nc, size, size) uint8."""
    crop = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    return crop(image.convert("RGB" if nc == 3 else "L")).numpy()


def expected_contents(paths, size=16, nc=3):
    return sorted(torchvision_pixels(Image.open(path), size, nc).tobytes() for path in paths)


def contents(images):
    """Return the bytes of all prepared images, sorted."""
    return sorted(row.numpy().tobytes() for batch in images.batches(4, seed=0, epoch=0) for row in batch)


def epoch_of(images, batch_size=4, seed=1, epoch=0, start=0, **process):
    return [batch.numpy().copy() for batch in images.batches(batch_size, seed, epoch, start, **process)]


def assert_cannot_load(*parts, **options):
    """Check that load_images raises a UserError of one line that has all `parts` in it."""
    with pytest.raises(UserError) as caught:
        load_images(image_size=16, **options)
    assert "\n" not in str(caught.value)
    assert [part for part in parts if str(part) not in str(caught.value)] == []


def image_of(path, seed):
    """Return the image of one seed, generated alone from the weights `path`, as an array (SIZE, SIZE, 3)."""
    netG = load_generator(path)
    return generate_images(netG, latents([seed], netG.nz))[0].permute(1, 2, 0).numpy()


def tile(grid, row, column):
    """Return an image of SIZE x SIZE in a grid of images."""
    top, left = 2 + row * (SIZE + 2), 2 + column * (SIZE + 2)  # 2 pixels between
    return np.asarray(grid)[top : top + SIZE, left : left + SIZE]


def write_lmdb(folder, images):
    """Write PIL images, or bytes instead of an image, as a database of LSUN."""
    import lmdb

    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 22) as base, base.begin(write=True) as transaction:
        for image in images:
            content = image
            if isinstance(image, Image.Image):
                image.save(file := io.BytesIO(), "PNG")
                content = file.getvalue()
            transaction.put(hashlib.sha1(content).hexdigest().encode(), content)  # the key that LSUN uses
    (folder / "lock.mdb").unlink()


def write_ghostscript_trap(folder, monkeypatch):
    """Put a program `gs` on the PATH that writes the file it returns; return that path and an EPS image, bytes."""
    marker, program = folder / "ghostscript-was-here", folder / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ntouch "{marker}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    noise().save(file := io.BytesIO(), "EPS")
    with contextlib.suppress(OSError):  # that it writes no image
        Image.open(io.BytesIO(file.getvalue())).load()
    assert marker.exists()  # the trap works
    marker.unlink()
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return marker, file.getvalue()

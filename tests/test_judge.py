"""The Fréchet distance against closed forms, with a feature network of a few lines; what a run keeps by it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from test_commands import RUN, SMALL, here
from torch import nn

import dcgan
import generate
from data import Images, load_images
from models import Generator, latents, load_generator, pictures
from runs import RunFolder

pytest.importorskip("torchmetrics")
from judge import Judge  # noqa: E402


class Corners(nn.Module):
    """Two numbers of a picture: the red of its first pixel, and the green of its last, as fractions."""

    num_features = 2

    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0], x[:, 1, -1, -1]], 1).float() / 255


@pytest.fixture(autouse=True)
def corners(monkeypatch):
    """In runs as well, this is the network."""
    monkeypatch.setattr(dcgan, "Judge", lambda images, count, device: Judge(images, count, device, Corners()))


def rows_with(red, green):
    rows = np.zeros((len(red), 3, 16, 16), np.uint8)
    rows[:, 0, 0, 0], rows[:, 1, -1, -1] = red, green
    return rows


def test_distance_of_gaussians_is_the_closed_form(monkeypatch):
    """Of independent features: the sum of (difference of means)^2 + (difference of standard deviations)^2."""
    draw = np.random.default_rng(0)

    def gaussians(count, *parameters):
        return rows_with(*(draw.normal(mean, std, count).round().clip(0, 255) for mean, std in parameters))

    real, fake = gaussians(20_000, (100, 20), (140, 10)), gaussians(20_000, (130, 25), (120, 30))
    left = iter(torch.from_numpy(fake).split(256))
    monkeypatch.setattr("judge.pictures", lambda netG, z: next(left))
    judge = Judge(Images(real, [], []), 20_000, torch.device("cpu"), Corners())
    expected = (30**2 + 5**2 + 20**2 + 20**2) / 255**2
    assert judge.distance(Generator(4, 4, 3, 16)) == pytest.approx(expected, rel=0.02)


def test_distance_of_a_generator_follows_from_its_first_pictures():
    """The general form, by numpy: |m - n|^2 + trace(C + D - 2 sqrt(C D))."""
    torch.manual_seed(0)
    netG = Generator(4, 4, 3, 16)
    netG.main[-2].weight.data.mul_(20)
    real = np.random.default_rng(1).integers(0, 256, (500, 3, 16, 16), np.uint8)
    judge = Judge(Images(real, [], []), 300, torch.device("cpu"), Corners())
    features = [Corners()(torch.as_tensor(x)).double().numpy() for x in (real, pictures(netG, latents(range(300), 4)))]
    (m, n), (c, d) = [f.mean(0) for f in features], [np.cov(f.T) for f in features]
    roots = np.sqrt(np.linalg.eigvals(c @ d).real.clip(0))
    expected = ((m - n) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * roots.sum()
    assert judge.distance(netG) == pytest.approx(expected, rel=1e-5)
    assert judge.distance(netG) == judge.distance(netG)


def test_grey_pictures_are_seen_as_colour():
    grey = np.random.default_rng(1).integers(0, 256, (50, 1, 16, 16), np.uint8)
    alike = Images(np.repeat(grey, 3, 1), [], [])
    netG = Generator(4, 4, 1, 16)
    a, b = (
        Judge(images, 20, torch.device("cpu"), Corners()).distance(netG) for images in (Images(grey, [], []), alike)
    )
    assert a == pytest.approx(b, rel=1e-9)


def test_the_photographs_are_looked_at_once(tmp_path):
    images = load_images("fake", image_size=16, cache=tmp_path)
    netG, device = Generator(4, 4, 3, 16), torch.device("cpu")
    first = Judge(images, 20, device, Corners()).distance(netG)
    assert len(list(tmp_path.glob("*-Corners.fid"))) == 1

    def fail(*_, **__):
        raise AssertionError

    images.batches = fail
    assert Judge(images, 20, device, Corners()).distance(netG) == first


def test_a_run_keeps_the_best_epoch(tmp_path, capsys):
    folder = tmp_path / "run" / "out"
    assert here(folder, *RUN, "--fid", "40") == 0
    with open(folder / "log.csv") as file:
        lines = file.read().splitlines()
    assert lines[0].endswith(",images_per_s,fid")
    rows = RunFolder(folder).rows or [
        dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]
    ]
    measured = {int(row["epoch"]): float(row["fid"]) for row in rows if row["fid"]}
    assert sorted(measured) == [0, 1, 2]
    best = min(measured, key=measured.get)
    state, expected = (torch.load(folder / f"netG{name}.pth") for name in ("_best", f"_ema_epoch_{best}"))
    assert all(torch.equal(state[name], t) for name, t in expected.items())
    loaded, plain = load_generator(folder), load_generator(folder, average=False)
    assert all(torch.equal(t, state[name]) for name, t in loaded.state_dict().items())
    newest = torch.load(folder / "netG_epoch_2.pth")
    assert all(torch.equal(t, newest[name]) for name, t in plain.state_dict().items())
    # continued: the distances before are kept, those that were lost are measured again
    assert here(folder, "--resume", "--niter", "4") == 0
    with open(folder / "log.csv") as file:
        again = file.read().splitlines()
    assert again[: len(lines)] == lines
    assert len([line for line in again[1:] if line.split(",")[-1]]) == 4
    generate.main(["--load_path", str(folder), "--outf", str(tmp_path / "made"), "--num_output", "2"])


def test_without_torchmetrics_a_run_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['torchmetrics'] = None; import dcgan; sys.exit(dcgan.main(sys.argv[1:]))"
    options = [*SMALL.split(), "--dry-run", "--fid", "10", "--outf", str(tmp_path / "out"), "--cache", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=dcgan.__file__.rsplit("/", 1)[0], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "dcgan.py: --fid needs torchmetrics and torch-fidelity: pip install 'torchmetrics[image]'\n"
    assert not (tmp_path / "out").exists()

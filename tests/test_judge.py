"""The Fréchet distance against closed forms, with a feature network of a few lines; what a run keeps by it."""

import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_commands import RUN, SMALL, here, log_rows
from torch import nn

import dcgan
import generate
from data import PreparedImages, load_images
from models import Generator, generate_images, load_generator
from support.errors import UserError
from support.latents import latents
from support.run_folder import RunFolder

pytest.importorskip("torchmetrics")
from support.fid import FidMeter


class Corners(nn.Module):
    """Two numbers of a picture: the red of its first pixel, and the green of its last, as fractions."""

    num_features = 2

    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0], x[:, 1, -1, -1]], 1).float() / 255


class CornersMeter(FidMeter):
    """The judge of the runs here."""

    check = staticmethod(lambda: None)  # it needs less than the usual one

    def __init__(self, images, count, device):
        super().__init__(images, count, device, Corners())


@pytest.fixture(autouse=True)
def corners(monkeypatch):
    monkeypatch.setattr(dcgan, "FidMeter", CornersMeter)


def distances_of(folder):
    """Return {epoch: distance} as log.csv has it."""
    return {int(row["epoch"]): row["fid"] for row in log_rows(folder) if "fid" in row}


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
    monkeypatch.setattr("support.fid.pictures", lambda netG, z: next(left))
    judge = FidMeter(PreparedImages(real, [], []), 20_000, torch.device("cpu"), Corners())
    expected = (30**2 + 5**2 + 20**2 + 20**2) / 255**2
    assert judge.distance(Generator(4, 4, 3, 16)) == pytest.approx(expected, rel=0.02)


def test_distance_of_a_generator_follows_from_its_first_pictures():
    """The general form, by numpy: |m - n|^2 + trace(C + D - 2 sqrt(C D))."""
    torch.manual_seed(0)
    netG = Generator(4, 4, 3, 16)
    netG.main[-2].weight.data.mul_(20)
    real = np.random.default_rng(1).integers(0, 256, (500, 3, 16, 16), np.uint8)
    judge = FidMeter(PreparedImages(real, [], []), 300, torch.device("cpu"), Corners())
    features = [
        Corners()(torch.as_tensor(x)).double().numpy() for x in (real, generate_images(netG, latents(range(300), 4)))
    ]
    (m, n), (c, d) = [f.mean(0) for f in features], [np.cov(f.T) for f in features]
    roots = np.sqrt(np.linalg.eigvals(c @ d).real.clip(0))
    expected = ((m - n) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * roots.sum()
    assert judge.distance(netG) == pytest.approx(expected, rel=1e-5)
    assert judge.distance(netG) == judge.distance(netG)


def test_grey_pictures_are_seen_as_colour():
    grey = np.random.default_rng(1).integers(0, 256, (50, 1, 16, 16), np.uint8)
    alike = PreparedImages(np.repeat(grey, 3, 1), [], [])
    netG = Generator(4, 4, 1, 16)
    a, b = (
        FidMeter(images, 20, torch.device("cpu"), Corners()).distance(netG)
        for images in (PreparedImages(grey, [], []), alike)
    )
    assert a == pytest.approx(b, rel=1e-9)


def test_the_photographs_are_looked_at_once(tmp_path):
    images = load_images("fake", image_size=16, cache=tmp_path)
    netG, device = Generator(4, 4, 3, 16), torch.device("cpu")
    first = FidMeter(images, 20, device, Corners()).distance(netG)
    assert len(list(tmp_path.glob("*-Corners.fid"))) == 1

    def fail(*_, **__):
        raise AssertionError

    images.batches = fail
    assert FidMeter(images, 20, device, Corners()).distance(netG) == first


def equal(a, b):
    return all(torch.equal(a[name], t) for name, t in b.items())


def test_a_run_keeps_the_best_epoch(tmp_path, monkeypatch, capsys):
    folder, told = tmp_path / "run" / "out", [3.0, 1.0, 2.0, 1.5]
    monkeypatch.setattr(CornersMeter, "distance", lambda *_: told.pop(0))
    assert here(folder, *RUN, "--fid", "40") == 0
    assert distances_of(folder) == {0: 3.0, 1: 1.0, 2: 2.0}
    best, first, second, third = (
        torch.load(folder / f"netG_{name}.pth") for name in ("best", "ema_epoch_0", "ema_epoch_1", "ema_epoch_2")
    )
    assert equal(best, second)
    assert not equal(best, first)
    assert not equal(best, third)
    assert equal(load_generator(folder).state_dict(), second)
    assert equal(load_generator(folder, average=False).state_dict(), torch.load(folder / "netG_epoch_2.pth"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Frechet")]
    lowest = ", the lowest so far: netG_best.pth"
    assert said == [f"Frechet distance 3{lowest}", f"Frechet distance 1{lowest}", "Frechet distance 2"]
    # continued: the distances before are kept, and count
    assert here(folder, "--resume", "--niter", "4") == 0
    assert distances_of(folder) == {0: 3.0, 1: 1.0, 2: 2.0, 3: 1.5}
    assert equal(load_generator(folder).state_dict(), second)
    capsys.readouterr()
    generate.main(["--load_path", str(folder), "--outf", str(tmp_path / "made"), "--num_output", "2"])
    assert capsys.readouterr().out.endswith(f", from {folder}/netG_best.pth\n")


def test_what_was_not_measured_is_when_the_run_goes_on(tmp_path, monkeypatch):
    """Killed while it measured, a run has lost no epoch."""
    unbroken, killed = tmp_path / "unbroken" / "out", tmp_path / "killed" / "out"
    assert here(unbroken, *RUN, "--fid", "40") == 0
    distance = CornersMeter.distance

    def once(self, netG, stopped):
        return sys.exit() if (killed / "netG_epoch_1.pth").exists() else distance(self, netG, stopped)

    monkeypatch.setattr(CornersMeter, "distance", once)
    with pytest.raises(SystemExit):
        here(killed, *RUN, "--fid", "40")
    monkeypatch.setattr(CornersMeter, "distance", distance)
    assert torch.load(killed / "checkpoint.pth")["epoch"] == 2
    assert sorted(distances_of(killed)) == [0]
    assert here(killed, "--resume") == 0
    assert distances_of(killed) == distances_of(unbroken)
    assert equal(torch.load(killed / "netG_best.pth"), torch.load(unbroken / "netG_best.pth"))


def test_distances_of_unequal_numbers_are_not_compared(tmp_path, capsys):
    folder = tmp_path / "run" / "out"
    assert here(folder, *RUN, "--fid", "40", "--niter", "1") == 0
    with pytest.raises(SystemExit, match="2"):
        here(folder, "--resume", "--fid", "50", "--niter", "2")
    assert "has fid 40, not 50: leave that out" in capsys.readouterr().err
    assert here(folder, "--resume", "--fid", "0", "--niter", "2") == 0  # as where torchmetrics is missing
    assert sorted(distances_of(folder)) == [0]
    with pytest.raises(SystemExit, match="2"):  # it has not been forgotten
        here(folder, "--resume", "--fid", "50", "--niter", "3")
    assert here(folder, "--resume", "--niter", "3") == 0
    assert sorted(distances_of(folder)) == [0, 1, 2]  # the last before it as well


def test_a_stopped_run_does_not_wait_for_its_distance(tmp_path, monkeypatch):
    folder, plotted = tmp_path / "run" / "out", []
    distance = CornersMeter.distance

    def interrupted(self, netG, stopped):
        if (folder / "netG_epoch_1.pth").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return distance(self, netG, stopped)

    monkeypatch.setattr(CornersMeter, "distance", interrupted)
    assert here(folder, *RUN, "--fid", "40") == 128 + signal.SIGTERM
    assert sorted(distances_of(folder)) == [0]
    monkeypatch.setattr(CornersMeter, "distance", distance)
    monkeypatch.setattr(RunFolder, "plot_losses", lambda *_: plotted.append(sorted(distances_of(folder))))
    assert here(folder, "--resume") == 0
    assert plotted == [[0, 1], [0, 1], [0, 1, 2]]  # measured, plotted; then saved, measured


def test_rows_that_were_lost_get_no_distance_of_others(tmp_path):
    folder = tmp_path / "run" / "out"
    assert here(folder, *RUN, "--niter", "2") == 0
    log = folder / "log.csv"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if not line.startswith("1,")))
    assert here(folder, "--resume", "--fid", "40", "--niter", "3") == 0
    assert sorted(distances_of(folder)) == [2]


def test_too_little_memory_names_the_way_out(monkeypatch):
    def fail(self, x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Corners, "forward", fail)
    with pytest.raises(UserError, match=r"^--fid: cpu has too little memory .*; --fid 0 goes on without it$"):
        FidMeter(PreparedImages(np.zeros((9, 3, 16, 16), np.uint8), [], []), 20, torch.device("cpu"), Corners())


@pytest.mark.parametrize("damage", ["cut", "not a dictionary", "no sums", "of another network"])
def test_damaged_features_are_computed_anew(tmp_path, damage):
    images = load_images("fake", image_size=16, cache=tmp_path)
    netG, device = Generator(4, 4, 3, 16), torch.device("cpu")
    expected = FidMeter(images, 20, device, Corners()).distance(netG)
    (kept,) = tmp_path.glob("*-Corners.fid")
    state = torch.load(kept)
    if damage == "cut":
        kept.write_bytes(kept.read_bytes()[:-100])
    else:
        other = {name: torch.zeros(3) for name in state}
        torch.save({"not a dictionary": [1], "no sums": {"a": 1}, "of another network": other}[damage], kept)
    assert FidMeter(images, 20, device, Corners()).distance(netG) == expected
    assert equal(torch.load(kept), state)


def test_features_that_cannot_be_kept_end_no_run(tmp_path, monkeypatch, capsys):
    def refuse(path, _):
        raise OSError(f"{path} could not be written")

    images = load_images("fake", image_size=16, cache=tmp_path)
    monkeypatch.setattr("support.fid.write_atomically", refuse)
    assert FidMeter(images, 20, torch.device("cpu"), Corners()).distance(Generator(4, 4, 3, 16)) > 0
    assert "warning: the next run must look at the photographs again: " in capsys.readouterr().err


@pytest.mark.parametrize(("photographs", "count"), [(1, 20), (20, 1)])
def test_one_picture_has_no_distance(photographs, count):
    images = PreparedImages(np.zeros((photographs, 3, 16, 16), np.uint8), [], [])
    with pytest.raises(UserError, match=f"--fid needs 2 .*; there are {photographs} and {count}"):
        FidMeter(images, count, torch.device("cpu"), Corners())


@pytest.mark.parametrize(
    "error", [OSError("no route\nto host"), EOFError(), pickle.UnpicklingError("invalid load key")]
)
def test_inception_that_cannot_be_had_is_error_text(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", fail)
    with pytest.raises(
        UserError, match=r"^--fid: Inception's weights cannot be downloaded to .*checkpoints, or read there \(.*\)$"
    ):
        FidMeter(PreparedImages(np.zeros((9, 3, 16, 16), np.uint8), [], []), 20, torch.device("cpu"))


def test_without_torchmetrics_a_run_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['torchmetrics'] = None; import dcgan; sys.exit(dcgan.main(sys.argv[1:]))"
    options = [*SMALL.split(), "--dry-run", "--fid", "10", "--outf", str(tmp_path / "out"), "--cache", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=dcgan.__file__.rsplit("/", 1)[0], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "dcgan.py: --fid needs torchmetrics and torch-fidelity: pip install 'torchmetrics[image]'\n"
    assert list(tmp_path.iterdir()) == []  # nor has it prepared pictures

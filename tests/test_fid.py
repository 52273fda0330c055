"""The Fréchet distance against closed forms, with a feature network of a few lines; what a run keeps by it."""

import os
import pickle
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import RUN, assert_refused, assert_same, checkpoint, log_rows, run_dcgan, run_generate
from torch import nn

import dcgan
from data import PreparedImages, load_images
from models import Generator, generate_images, load_generator
from support.errors import UserError
from support.latents import latents
from support.run_folder import RunFolder

pytest.importorskip("torchmetrics")
from support.fid import FidMeter  # noqa: E402

CPU = torch.device("cpu")
FID_RUN = [*RUN, "--batchSize", 100, "--fid", 40]  # 10 steps an epoch


class Corners(nn.Module):
    """Two numbers of an image: the red of its first pixel, and the green of its last, as fractions."""

    num_features = 2

    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0], x[:, 1, -1, -1]], 1).float() / 255


class CornersMeter(FidMeter):
    def __init__(self, images, count, device, generate):
        super().__init__(images, count, device, generate, Corners())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A cache folder with the data set "fake"; tests copy it."""
    folder = tmp_path_factory.mktemp("prepared")
    load_images("fake", image_size=16, cache=folder)
    return folder


@pytest.fixture
def cache(prepared, tmp_path):
    """A cache folder with the data set "fake", where run_dcgan looks for it if the run folder is in tmp_path."""
    return shutil.copytree(prepared, tmp_path / "cache" / "dcgan")


def distance_to(images, netG, count=20):
    return CornersMeter(images, count, CPU, generate_images).distance(netG)


def small_generator(nc=3):
    torch.manual_seed(0)
    netG = Generator(4, 4, nc, 16)
    netG.main[-2].weight.data.mul_(20)
    return netG


def random_images(count, nc=3):
    rows = np.random.default_rng(1).integers(0, 256, (count, nc, 16, 16), np.uint8)
    return PreparedImages(rows, [], [])


# The distance


def test_distance_of_gaussians_is_the_closed_form():
    """For independent features: the sum of (difference of means)^2 + (difference of standard deviations)^2."""
    draw = np.random.default_rng(0)

    def gaussians(count, *parameters):
        rows = np.zeros((count, 3, 16, 16), np.uint8)
        red, green = (draw.normal(mean, std, count).round().clip(0, 255) for mean, std in parameters)
        rows[:, 0, 0, 0], rows[:, 1, -1, -1] = red, green
        return rows

    real, fake = gaussians(20_000, (100, 20), (140, 10)), gaussians(20_000, (130, 25), (120, 30))
    left = iter(torch.from_numpy(fake).split(256))
    meter = CornersMeter(PreparedImages(real, [], []), 20_000, CPU, lambda netG, z: next(left))
    expected = (30**2 + 5**2 + 20**2 + 20**2) / 255**2
    assert meter.distance(Generator(4, 4, 3, 16)) == pytest.approx(expected, rel=0.02)


def test_distance_of_a_generator_follows_from_its_first_images():
    """The general form, by numpy: |m - n|^2 + trace(C + D - 2 sqrt(C D))."""
    netG, images = small_generator(), random_images(500)
    meter = CornersMeter(images, 300, CPU, generate_images)
    generated = generate_images(netG, latents(range(300), 4))
    features = [Corners()(torch.as_tensor(x)).double().numpy() for x in (images.array, generated)]
    (m, n), (c, d) = [f.mean(0) for f in features], [np.cov(f.T) for f in features]
    roots = np.sqrt(np.linalg.eigvals(c @ d).real.clip(0))
    expected = ((m - n) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * roots.sum()
    assert meter.distance(netG) == pytest.approx(expected, rel=1e-5)
    assert meter.distance(netG) == meter.distance(netG)


def test_grey_images_are_measured_as_color():
    netG, grey = small_generator(nc=1), random_images(50, nc=1)
    color = PreparedImages(np.repeat(grey.array, 3, 1), [], [])
    assert distance_to(grey, netG) == pytest.approx(distance_to(color, netG), rel=1e-9)


def test_it_stops_when_asked():
    meter = CornersMeter(random_images(50), 300, CPU, generate_images)
    assert meter.distance(small_generator(), lambda: True) is None
    assert meter.distance(small_generator()) > 0


# Features of the real images


def test_features_of_real_images_are_computed_once(cache):
    images, netG = load_images("fake", image_size=16, cache=cache), small_generator()
    first = distance_to(images, netG)
    assert len(list(cache.glob("*-Corners.fid"))) == 1

    def fail(*_, **__):
        raise AssertionError

    images.batches = fail
    assert distance_to(images, netG) == first


@pytest.mark.parametrize("damage", ["cut", "not a dictionary", "no sums", "of another network"])
def test_damaged_features_are_computed_anew(cache, damage):
    images, netG = load_images("fake", image_size=16, cache=cache), small_generator()
    expected = distance_to(images, netG)
    (cached,) = cache.glob("*-Corners.fid")
    state = torch.load(cached)
    if damage == "cut":
        cached.write_bytes(cached.read_bytes()[:-100])
    else:
        other = {name: torch.zeros(3) for name in state}
        torch.save({"not a dictionary": [1], "no sums": {"a": 1}, "of another network": other}[damage], cached)
    assert distance_to(images, netG) == expected
    assert_same(torch.load(cached), state)


def test_features_that_cannot_be_cached_end_no_run(cache, monkeypatch, capsys):
    def refuse(path, _):
        raise OSError(f"{path} could not be written")

    images = load_images("fake", image_size=16, cache=cache)
    monkeypatch.setattr("support.fid.write_atomically", refuse)
    assert distance_to(images, small_generator()) > 0
    assert "warning: the next run must compute the real images' features again: " in capsys.readouterr().err


# What it refuses


@pytest.mark.parametrize(("real", "generated"), [(1, 20), (20, 1)])
def test_one_image_has_no_distance(real, generated):
    with pytest.raises(UserError, match=f"--fid needs at least 2 .*; there are {real} and {generated}"):
        CornersMeter(random_images(real), generated, CPU, generate_images)


def test_too_little_memory_names_the_way_out(monkeypatch):
    def fail(self, x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Corners, "forward", fail)
    with pytest.raises(
        UserError,
        match=r"^--fid: cpu has too little memory .*; leave it out, or continue this run with --resume --fid 0$",
    ):
        CornersMeter(random_images(9), 20, CPU, generate_images)


@pytest.mark.parametrize(
    "error", [OSError("no route\nto host"), EOFError(), pickle.UnpicklingError("invalid load key")]
)
def test_inception_that_cannot_be_downloaded_is_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", fail)
    with pytest.raises(
        UserError, match=r"^--fid: Inception's weights cannot be downloaded to .*checkpoints, or read there \(.*\)$"
    ):
        FidMeter(random_images(9), 20, CPU, generate_images)


@pytest.mark.parametrize("package", ["torchmetrics", "torch_fidelity"])
def test_without_its_packages_a_run_says_what_to_install(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    words = "dcgan.py: --fid needs torchmetrics and torch-fidelity: pip install 'torchmetrics[image]'\n"
    assert_refused(lambda: run_dcgan(tmp_path / "out", *FID_RUN), capsys, words)
    assert list(tmp_path.iterdir()) == []  # nor has it prepared images


# Runs


@pytest.fixture
def corners(cache, monkeypatch):
    """Runs measure with CornersMeter, and draw nothing, which would take longer than all else here."""
    monkeypatch.setattr(dcgan, "FidMeter", CornersMeter)
    monkeypatch.setattr("support.options.check_installed", lambda: None)  # it needs less than the usual meter
    monkeypatch.setattr(RunFolder, "draw_or_warn", lambda *_: None)


def distances_of(folder):
    """Return {epoch: distance} of log.csv."""
    return {int(row["epoch"]): row["fid"] for row in log_rows(folder) if "fid" in row}


def at_once(self, function, *arguments):
    """Take the place of RunFolder.in_background."""
    function(*arguments)


def at_second_measurement(monkeypatch, act):
    """Call act() at the start of the second measurement from now on; return the function that ends that."""
    distance, calls = CornersMeter.distance, []

    def measure(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            act()
        return distance(*arguments)

    monkeypatch.setattr(CornersMeter, "distance", measure)
    return lambda: monkeypatch.setattr(CornersMeter, "distance", distance)


@pytest.mark.usefixtures("corners")
def test_a_run_keeps_the_best_epoch(tmp_path, monkeypatch, capsys):
    folder, distances = tmp_path / "out", [3.0, 1.0, 2.0, 1.5]
    monkeypatch.setattr(CornersMeter, "distance", lambda *_: distances.pop(0))
    assert run_dcgan(folder, *FID_RUN) == 0
    assert distances_of(folder) == {0: 3.0, 1: 1.0, 2: 2.0}
    names = ("best", "ema_epoch_0", "ema_epoch_1", "ema_epoch_2")
    best, *epochs = (torch.load(folder / f"netG_{name}.pth") for name in names)
    same_first_layer = [torch.equal(best["main.0.weight"], epoch["main.0.weight"]) for epoch in epochs]
    assert same_first_layer == [False, True, False]
    assert_same(best, epochs[1])
    assert_same(load_generator(folder).state_dict(), best)
    assert_same(load_generator(folder, average=False).state_dict(), torch.load(folder / "netG_epoch_2.pth"))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FID")]
    lowest = ", the lowest so far: netG_best.pth"
    assert printed == [f"FID 3{lowest}", f"FID 1{lowest}", "FID 2"]
    # Resumed, it keeps the distances before, and compares with them.
    assert run_dcgan(folder, "--resume", "--niter", 4) == 0
    assert distances_of(folder) == {0: 3.0, 1: 1.0, 2: 2.0, 3: 1.5}
    assert_same(load_generator(folder).state_dict(), best)
    capsys.readouterr()
    run_generate(folder, "--num_output", 2)
    assert capsys.readouterr().out.endswith(f", from {folder}/netG_best.pth\n")


@pytest.mark.usefixtures("corners")
def test_a_run_that_ended_while_it_measured_measures_when_it_resumes(tmp_path, monkeypatch):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert run_dcgan(unbroken, *FID_RUN) == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "in_background", at_once)
        at_second_measurement(patch, sys.exit)
        with pytest.raises(SystemExit):
            run_dcgan(killed, *FID_RUN)
    assert checkpoint(killed)["epoch"] == 2
    assert sorted(distances_of(killed)) == [0]
    assert run_dcgan(killed, "--resume") == 0
    assert distances_of(killed) == distances_of(unbroken)
    assert_same(torch.load(killed / "netG_best.pth"), torch.load(unbroken / "netG_best.pth"))


@pytest.mark.usefixtures("corners")
def test_a_stopped_run_does_not_wait_for_its_distance(tmp_path, monkeypatch):
    folder, plotted = tmp_path / "out", []
    undo = at_second_measurement(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_dcgan(folder, *FID_RUN) == 128 + signal.SIGTERM
    assert sorted(distances_of(folder)) == [0]
    undo()

    def record(self, draw, name, *arguments):
        if name == "losses.png":
            plotted.append([row["epoch"] for row in arguments[0] if "fid" in row])

    monkeypatch.setattr(RunFolder, "draw_or_warn", record)
    monkeypatch.setattr(RunFolder, "in_background", at_once)
    assert run_dcgan(folder, "--resume") == 0
    assert plotted == [[0, 1], [0, 1], [0, 1, 2]]  # measured, plotted; then saved, measured


@pytest.mark.usefixtures("corners")
def test_distances_of_different_sample_counts_are_not_compared(tmp_path, capsys):
    folder = tmp_path / "out"
    assert run_dcgan(folder, *FID_RUN, "--niter", 1) == 0
    capsys.readouterr()
    refused = "has --fid 40, not 50; leave out what differs"
    assert_refused(lambda: run_dcgan(folder, "--resume", "--fid", 50, "--niter", 2), capsys, refused)
    assert run_dcgan(folder, "--resume", "--fid", 0, "--niter", 2) == 0  # as where torchmetrics is missing
    assert sorted(distances_of(folder)) == [0]
    assert_refused(lambda: run_dcgan(folder, "--resume", "--fid", 50, "--niter", 3), capsys, refused)  # not forgotten
    assert run_dcgan(folder, "--resume", "--niter", 3) == 0
    assert sorted(distances_of(folder)) == [0, 1, 2]  # and the one before it


@pytest.mark.usefixtures("corners")
def test_rows_that_were_lost_get_no_distance_of_others(tmp_path):
    folder = tmp_path / "out"
    assert run_dcgan(folder, *FID_RUN, "--fid", 0, "--niter", 2) == 0
    log = folder / "log.csv"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if not line.startswith("1,")))
    assert run_dcgan(folder, "--resume", "--fid", 40, "--niter", 3) == 0
    assert sorted(distances_of(folder)) == [2]

import os
import signal
import urllib.error
import urllib.request

import pytest
import torch
from helpers import FOLDER, RUN, SIZE, write_images
from torchvision import datasets

import dcgan
from models import Generator, set_batch_norm_statistics, weights_init
from support import run_folder
from support.latents import latents

LONGEST = ("test_dcgan.py", "test_distributed.py", "test_faults.py", "test_simulated.py")

torch.set_num_threads(1)  # with more, networks this small wait for each other on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that at the end no worker waits for another."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_a_terminal():
    """Undo what nohup and a shell's background jobs ignore: the tests' processes would ignore it too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Leave losses.png empty: drawing it takes half the time of a short run. Other processes and fixtures draw it."""
    monkeypatch.setattr(run_folder, "plot_losses", lambda path, *_: path.touch())


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The folder of a run of RUN that was never stopped; tests leave it as it is."""
    base = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        assert dcgan.main(RUN) == 0
    return base / "out"


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """No network, the user's cache folder in tmp_path, and an empty working directory."""

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(datasets, "CelebA", offline)


@pytest.fixture
def weights_file(tmp_path):
    """A file of generator weights whose images use the whole range and change slowly with the latent vector."""
    netG = Generator(12, 8, 3, SIZE)
    torch.manual_seed(0)
    netG.apply(weights_init)
    set_batch_norm_statistics(netG, [latents(range(64), netG.nz)])
    netG.main[-2].weight.data.mul_(4)
    torch.save(netG.state_dict(), tmp_path / "netG.pth")
    return tmp_path / "netG.pth"


@pytest.fixture(scope="session")
def few_steps(tmp_path_factory):
    """The options of a run over 96 images: 2 epochs of 3 steps, each in a row of the log."""
    folder = tmp_path_factory.mktemp("few")
    write_images(folder, *(f"{i}.png" for i in range(96)))
    options = "--workers 0 --batchSize 32 --niter 2 --log-every 1 --manualSeed 3"
    return [*FOLDER, "--dataroot", folder, *options.split()]

"""The sampling program: images that depend on weights and seed alone, what it refuses, what it writes and shows."""

import contextlib
import io
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import (
    EPOCHS,
    ROOT,
    assert_refused,
    files,
    finish,
    hashes,
    image_of,
    networks,
    randomised,
    run_generate,
    start,
)
from PIL import Image

import generate
from models import Generator, load_generator
from support.errors import UserError
from support.latents import latents

# Images


def test_images_depend_on_weights_and_seed_alone(unbroken, tmp_path):
    command = ["--load_path", unbroken, "--num_output", 70, "--batchSize", 16]
    errors = finish(start(tmp_path / "sampled", "generate.py", *command))
    assert errors == ""
    folder = tmp_path / "sampled" / "generated"
    assert [p.name for p in files(folder)] == [f"seed{k:06d}.png" for k in range(70)]
    assert Image.open(tmp_path / "sampled" / "generated.png").size == (146, 146)  # the first 64
    for i, (count, batch, seed) in enumerate([(1, 256, 0), (1, 256, 69), (70, 1, 0), (7, 3, 33), (66, 65, 2)]):
        options = ["--load_path", unbroken, "--outf", tmp_path / str(i), "--num_output", count, "--batchSize", batch]
        generate.main([str(option) for option in (*options, "--manualSeed", seed)])
        assert [p.name for p in files(tmp_path / str(i))] == [f"seed{seed + k:06d}.png" for k in range(count)]
        for image in files(tmp_path / str(i)):
            assert image.read_bytes() == (folder / image.name).read_bytes()
    # Image 5 by another way: the averaged generator, a latent vector drawn here, one at a time.
    netG, z = load_generator(unbroken / f"netG_ema_epoch_{EPOCHS - 1}.pth"), torch.Generator().manual_seed(5)
    with torch.no_grad():
        x = netG(torch.randn(10, generator=z)[None])[0].permute(1, 2, 0)
    shown = np.asarray(Image.open(folder / "seed000005.png")).astype(int)
    assert np.abs(shown - ((x.numpy() + 1) * 127.5)).max() < 0.51


def test_the_first_image_waits_for_no_slow_import(weights_file):
    """Each of these takes as long as a third of torch, or longer."""
    command = ["--load_path", str(weights_file), "--num_output", "1", "--outf", str(weights_file.parent / "one")]
    program = f"import sys, generate; generate.main({command}); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" in found.stdout.split()
    assert not {"torchvision", "matplotlib", "torch._dynamo"} & set(found.stdout.split())


@pytest.mark.parametrize("size", [16, 28, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("nc", [1, 3])
def test_images_of_every_size_are_written(size, nc, tmp_path):
    torch.save(randomised(Generator(4, 4, nc, size)).state_dict(), tmp_path / "netG.pth")
    folder = run_generate(tmp_path / "netG.pth", "--num_output", 2)
    images = [Image.open(path) for path in folder.glob("seed*.png")]
    assert [(image.size, image.mode) for image in images] == [((size, size), "L" if nc == 1 else "RGB")] * 2


def test_everything_at_once(weights_file, capsys):
    folder = run_generate(weights_file, "--interpolate", 2, "--arithmetic", "1+2", "--explore")
    names = ["walk.png", "walk.gif", "arithmetic.png", "explore.html"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    output = capsys.readouterr()
    assert output.out == f"{' and '.join(names)} in {folder}, from {weights_file}\n"
    assert output.err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
def test_any_number_of_samples_takes_the_same_memory(tmp_path):
    netG = Generator(4, 2, 3, 128)  # 48 KB an image
    netG.main[-2].weight.data.zero_()  # grey, which is compressed fastest
    torch.save(netG.state_dict(), tmp_path / "netG.pth")
    command = [sys.executable, ROOT / "tests/programs/generate_twice.py", "netG.pth"]
    output = subprocess.check_output(command, cwd=tmp_path, text=True)
    few, many = (int(line.split()[1]) for line in output.splitlines() if line.startswith("peak"))
    assert [len(list((tmp_path / count).glob("seed*.png"))) for count in ("100", "800")] == [100, 800]
    assert many - few < 20


# How it ends


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError("grid.png could not be written"), 1, "grid.png could not be written"),
        (KeyboardInterrupt(), 130, "interrupted; the images in"),
        (UserError("impossible"), 2, "impossible"),
    ],
)
def test_it_ends_with_a_line_and_a_code(weights_file, monkeypatch, capsys, error, code, words):
    def fail(*_):
        raise error

    monkeypatch.setattr(generate, "write_samples", fail)
    with pytest.raises(SystemExit) as end:
        run_generate(weights_file)
    errors = capsys.readouterr().err
    assert end.value.code == code
    assert errors.startswith(f"generate.py: {words}")
    assert errors.count("\n") == 1


def test_paths_may_begin_with_the_home_folder(weights_file, tmp_path, monkeypatch, capsys):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    generate.main([f"--load_path=~/{weights_file.name}", "--outf=~/sampled", "--num_output=1"])
    assert (tmp_path / "sampled" / "seed000000.png").is_file()
    assert capsys.readouterr().out.startswith(f"1 image of 16 x 16 in {tmp_path / 'sampled'}, and ")


def test_it_runs_where_the_output_is_no_file(weights_file):
    """As in a notebook."""
    with contextlib.redirect_stdout(output := io.StringIO()), contextlib.redirect_stderr(output):
        folder = run_generate(weights_file, "--num_output", 2)
    assert output.getvalue() == f"2 images of 16 x 16 in {folder}, and {folder}.png, from {weights_file}\n"
    assert len(files(folder)) == 2


# --show


def test_show_shows_the_first_grid(weights_file, monkeypatch):
    shown = []
    monkeypatch.setattr(generate, "show", shown.append)
    run_generate(weights_file, "--arithmetic", "1", "--show")
    run_generate(weights_file, "--interpolate", 2, "--explore", "--show")
    run_generate(weights_file, "--num_output", 2, "--show")
    assert [path.name for path in shown] == ["arithmetic.png", "walk.png", "generated.png"]


@pytest.mark.parametrize("nc", [1, 3])
def test_the_window_shows_the_pixels_of_the_file(nc, tmp_path, monkeypatch):
    torch.save(randomised(Generator(4, 4, nc, 16)).state_dict(), tmp_path / "netG.pth")
    shown = []
    monkeypatch.setattr(plt, "imshow", lambda image, **options: shown.append((image, options)))
    monkeypatch.setattr(plt, "show", lambda: shown.append("window"))
    monkeypatch.setattr(plt, "axis", lambda _: None)
    monkeypatch.setattr(plt, "get_backend", lambda: "QtAgg")
    folder = run_generate(tmp_path / "netG.pth", "--num_output", 4, "--show")
    (image, options), window = shown
    assert window == "window"
    assert options == {"cmap": "gray", "vmin": 0, "vmax": 1}  # they apply to images of one channel
    pixels = np.asarray(Image.open(f"{folder}.png"))
    assert np.array_equal((np.asarray(image) * 255).round(), pixels)


def test_without_a_window_the_file_to_open_is_named(weights_file, monkeypatch, capsys):
    monkeypatch.setattr(plt, "get_backend", lambda: "agg")
    folder = run_generate(weights_file, "--num_output", 2, "--show")
    assert capsys.readouterr().err == f"warning: --show: matplotlib cannot open a window here; open {folder}.png\n"


# What it refuses


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Weights and folders that requests can name, good and bad."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "empty").mkdir()
    netG, netD = networks()
    torch.save(netG.state_dict(), folder / "G.pth")
    torch.save(netD.state_dict(), folder / "D.pth")
    torch.save(Generator(4, 4, 2, 16).state_dict(), folder / "two_channels.pth")
    torch.save({name: t * float("nan") for name, t in netG.state_dict().items()}, folder / "nan.pth")
    (folder / "page.pth").write_text("<!DOCTYPE html>")
    return folder


NUMBERS = {  # values out of range
    "--num_output": "0 -1",
    "--batchSize": "0",
    "--manualSeed": "-1 99999999999999999999 4294967296",
    "--interpolate": "1 0 1.5",
}
REFUSED = [(f"{option} {value}", option) for option, values in NUMBERS.items() for value in values.split()]
REFUSED += [
    ("--manualSeed 4294967295 --num_output 2", "the last seed is 4294967295, and 2 are needed"),
    ("--manualSeed 4294967290 --num_output 1 --interpolate 7", "the last seed is 4294967295, and 7 are needed"),
    ("--outf {m}/D.pth", "--outf"),
    ("--outf {m}/D.pth/below", "--outf"),
    ("--load_path {m}/D.pth", "it holds a discriminator"),
    ("--load_path {m}/nan.pth", "not finite"),
    ("--load_path {m}/page.pth", "page.pth"),
    ("--load_path {m}/nowhere", "no such file"),
    ("--load_path {m}/empty", "no weights"),
    ("--load_path {m}/two_channels.pth", "2 channels"),
    ("--nonsense", "--nonsense"),
    ("--interpolate 2 --num_output 64", "--num_output has no effect here: --interpolate writes no single images"),
    ("--explore --batchSize 8", "--batchSize has no effect here: --explore writes no single images"),
    ("--arithmetic 1+2 --manualSeed 0", "--manualSeed has no effect here: --arithmetic names its seeds"),
    ("--explore --show", "--show has no effect here: open explore.html in a browser"),
    ("--outf {m}/" + "a" * 300, "cannot be made ("),
]
REFUSED += [] if torch.cuda.is_available() else [("--cuda", "--cuda")]


@pytest.mark.parametrize(("command", "words"), REFUSED)
def test_requests_that_cannot_work_are_refused(tmp_path, monkeypatch, capsys, material, command, words):
    monkeypatch.chdir(tmp_path)
    before = hashes(material)
    arguments = ["--load_path", str(material / "G.pth"), *command.format(m=material).split()]
    assert_refused(lambda: generate.main(arguments), capsys, words)
    assert list(tmp_path.iterdir()) == []
    assert hashes(material) == before


def test_torch_tells_no_more_seeds_apart(weights_file):
    """Which is why seeds end at 2**32."""
    assert torch.equal(latents([7], 5), latents([7 + 2**32], 5))
    folder = run_generate(weights_file, "--manualSeed", 2**32 - 1, "--num_output", 1)
    shown = Image.open(folder / "seed4294967295.png")
    assert np.array_equal(np.asarray(shown), image_of(weights_file, 2**32 - 1))

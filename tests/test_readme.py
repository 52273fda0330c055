"""Every command of the README, run as written but for small networks and few pictures."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_commands import files, finish, start
from test_data import lmdb_of, noise, write

from dcgan import build_parser as training_options
from generate import build_parser as sampling_options

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python ((?:dcgan|generate)\.py(?! --help)[^`\n&|;]*)", README)
SMALL = ["--imageSize", "16", "--nz", "4", "--ngf", "4", "--ndf", "4", "--workers", "0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the pictures that the README's commands speak of."""
    home = tmp_path_factory.mktemp("readme") / "home"
    write(
        home,
        "photos/a.png",
        "photos/b/c.png",
        "faces/a.png",
        "cifar/a/b.png",
        "data/celeba/img_align_celeba/000001.jpg",
    )
    lmdb_of(home / "lsun" / "bedroom_train_lmdb", [noise(seed=i) for i in range(3)])
    raw = home / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            bytes.fromhex("00000803 00000001 0000001c 0000001c") + bytes(784)
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes.fromhex("00000801 00000001 00"))
    return home


def test_the_readme_has_commands_and_pictures():
    assert len(COMMANDS) >= 10
    shown = re.findall(r"\]\((media/[^)]*)\)", README)
    assert {f"media/{path.name}" for path in (Path(__file__).parents[1] / "media").iterdir()} == set(shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme(command, home):
    program, *arguments = shlex.split(command)
    options = (training_options if program == "dcgan.py" else sampling_options)().parse_args(arguments)
    if program == "generate.py":
        if not (home / options.load_path).exists():
            shutil.copy(home / "out-faces" / "netG_epoch_0.pth", home / options.load_path)
        finish(start(home, program, *arguments))
        made = {path.name for path in files(home / options.outf)}
        if options.interpolate or options.arithmetic or options.explore:
            assert made & {"walk.gif", "arithmetic.png", "explore.html"}
        else:
            assert len(made) == options.num_output + 1
    elif "--cuda" not in arguments and options.dataset != "cifar10" and not options.fid:  # not to be had in a test
        for option in filter(None, (options.netG, options.netD)):  # of a later epoch than one step gives
            shutil.copy(home / option.rerank_and_world_size("11", "0"), home / option)
        continues = options.resume and "--imageSize" not in arguments  # what it was start_workers_off_main_thread with
        finish(start(home, program, *arguments, *([] if continues else SMALL), "--dry-run"))
        assert (home / options.outf / "checkpoint.pth").is_file()

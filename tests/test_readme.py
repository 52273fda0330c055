"""Every command of README.md and docs/, run as written but with small networks and few images; and their links."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, files, finish, noise, start, write_images, write_lmdb

import dcgan
import generate
from data import SOURCES
from models import Generator
from support.options import build_parser

PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README = PAGES[ROOT / "README.md"]
COMMANDS = [
    command.strip()
    for text in PAGES.values()
    for command in re.findall(r"python ((?:dcgan|generate)\.py(?! --help)[^`\n&|;]*)", text)
]
SMALL = ["--imageSize", "16", "--nz", "4", "--ngf", "4", "--ndf", "4", "--workers", "0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the images that the commands name. The commands run there one after another."""
    home = tmp_path_factory.mktemp("readme") / "home"
    names = ["photos/a.png", "photos/b/c.png", "faces/a.png", "anime/a.png", "hands/0/a.png"]
    write_images(home, *names, "data/celeba/img_align_celeba/000001.jpg")
    shutil.make_archive(home / "photos", "zip", home / "photos")
    shutil.copytree(ROOT / "media", home / "media", ignore=lambda _, names: [n for n in names if not n.endswith("pth")])
    torch.save(Generator(4, 4, 3, 16).state_dict(), home / "media" / "faces128.pth")  # a small one instead
    np.save(home / "photos.npy", [np.asarray(noise(seed=i)) for i in range(3)])
    write_lmdb(home / "lsun" / "bedroom_train_lmdb", [noise(seed=i) for i in range(3)])
    raw = home / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = bytes.fromhex("00000803 00000001 0000001c 0000001c")
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(784))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes.fromhex("00000801 00000001 00"))
    return home


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parent / "cache"))
    return home


def test_the_pages_have_commands_and_show_every_file_of_media():
    assert len(COMMANDS) >= 10
    shown = {name for text in PAGES.values() for name in re.findall(r"\]\((?:\.\./)?media/([^)]*)\)", text)}
    assert {path.relative_to(ROOT / "media").as_posix() for path in files(ROOT / "media")} == shown


def test_links_between_the_pages_lead_somewhere():
    anchors = {}
    for path, text in PAGES.items():
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
        anchors[path] = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for path, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?://)([^)]*)\)", text):
            name, _, anchor = target.partition("#")
            linked = (path.parent / name).resolve() if name else path
            assert linked.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors[linked], f"{path.name}: {target}"


def test_options_in_the_text_exist(capsys):
    known = set()
    for parser in (build_parser("", SOURCES), generate.build_parser()):
        known |= {option for action in parser._actions for option in action.option_strings}
    others = {"--nproc-per-node", "--nnodes", "--standalone", "--max-restarts", "--index-url"}  # of torchrun and pip
    for path, text in PAGES.items():
        lines = [line for line in text.splitlines() if not re.search(r"SBATCH|srun|scontrol|--rdzv|benchmark.py", line)]
        named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", "\n".join(lines)))
        assert named - known - others == set(), path.name


def needs_a_process(command):
    return "--ngpu" in command and "--cuda" not in command


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow if needs_a_process(c) else ()) for c in COMMANDS]
)
def test_a_command_does_what_the_text_says(command, at_home):
    program, *arguments = shlex.split(command)
    parser = build_parser("", SOURCES) if program == "dcgan.py" else generate.build_parser()
    options = parser.parse_args(arguments)
    if program == "generate.py":
        generate.main(arguments)
        written = {path.name for path in files(at_home / options.outf)}
        if options.interpolate or options.arithmetic or options.explore:
            assert written & {"walk.gif", "arithmetic.png", "explore.html"}
        else:
            assert len(written) == options.num_output
            assert (at_home / f"{options.outf}.png").is_file()
    elif "--cuda" not in arguments and options.dataset != "cifar10" and not options.fid:  # not to be had in a test
        for option in filter(None, (options.netG, options.netD)):
            shutil.copy(at_home / re.sub(r"\d+", "0", option), at_home / option)
        resumes = options.resume and "--imageSize" not in arguments  # it keeps what the run began with
        arguments += [*([] if resumes else SMALL), "--dry-run"]
        if needs_a_process(command):
            finish(start(at_home, program, *arguments))
        else:
            assert dcgan.main(arguments) == 0
        assert (at_home / options.outf / "checkpoint.pth").is_file()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_of_the_readme_runs(block, at_home):
    assert (at_home / "out").is_dir()  # from the commands
    exec(block, names := {})
    assert names["faces"].shape == (64, 3, 16, 16)
    assert names["faces"].dtype == torch.uint8
    assert names["x"].shape == (1, 3, 16, 16)
    assert names["x"].requires_grad

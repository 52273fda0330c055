"""support/options.py: the command line of dcgan.py, and requests that cannot work: refused, with nothing written."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import RUN, SMALL, assert_refused, hashes, run_dcgan

import dcgan
import generate
from data import SOURCES
from models import Discriminator, Generator
from support.options import SAVED_OPTIONS, build_parser, parse_options


def parse(folder, *arguments, world_size=1):
    """Return the options of a command line, and the checkpoint to resume from."""
    arguments = [str(argument) for argument in ("--outf", folder, *arguments)]
    return parse_options(build_parser("", SOURCES), arguments, world_size)


@pytest.fixture
def run(unbroken, tmp_path):
    return shutil.copytree(unbroken, tmp_path / "run")


# What the options mean


def test_the_papers_recipe_is_the_default(tmp_path):
    options, checkpoint = parse(tmp_path / "new")
    expected = {"image_size": 64, "nc": 3, "nz": 100, "ngf": 64, "ndf": 64, "batch_size": 128}
    expected |= {"lr": 0.0002, "beta1": 0.5, "flip": False, "compile": False, "fid": 0, "resume": False}
    expected |= {"augment": "none", "crop": 0}
    assert expected.items() <= vars(options).items()
    assert checkpoint is None
    assert list(tmp_path.iterdir()) == []


def test_names_of_the_public_example_keep_their_meaning(tmp_path):
    command = "--dataset folder --dataroot photos --workers 3 --batchSize 32 --imageSize 32 --nz 7 --ngf 8 --ndf 9"
    command += " --niter 4 --lr 0.1 --beta1 0.25 --cuda --ngpu 1 --netG g --netD d --dry-run --manualSeed 5"
    options, _ = parse(tmp_path, *command.split(), "--classes", "bedroom", "--accel")
    expected = {"dataset": "folder", "dataroot": "photos", "workers": 3, "batch_size": 32, "image_size": 32, "nz": 7}
    expected |= {"ngf": 8, "ndf": 9, "niter": 4, "lr": 0.1, "beta1": 0.25, "cuda": True, "ngpu": 1, "netG": "g"}
    expected |= {"netD": "d", "dry_run": True, "manual_seed": 5, "classes": "bedroom", "accel": True}
    assert expected.items() <= vars(options).items()


@pytest.mark.parametrize(
    "command", ["--dataset fake --dataroot x --cuda --dry-run", "--dataset fake --classes bedroom"]
)
def test_lines_that_work_with_the_public_example_work_although_an_option_has_no_effect(tmp_path, command):
    assert parse(tmp_path, *command.split())[0].dataset == "fake"


def test_a_dataroot_alone_means_a_folder_of_images_in_a_new_run(run, tmp_path):
    assert parse(tmp_path / "new", "--dataroot", "photos")[0].dataset == "folder"
    assert parse(tmp_path / "new", "--dataroot", "photos", "--resume")[0].dataset == "folder"
    assert parse(tmp_path / "new", "--dataroot", "photos", "--dataset", "mnist")[0].dataset == "mnist"
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    for dataset in ("cartoon", "folder"):  # cartoon: an earlier version began it with this very command line
        options = state["options"] | {"dataset": dataset, "dataroot": "photos"}
        torch.save(state | {"options": options}, run / "checkpoint.pth")
        assert parse(run, "--dataroot", "photos", "--resume")[0].dataset == dataset


def test_a_resumed_run_that_draws_its_images_takes_no_others(run, capsys):
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    drawn = state["options"] | {"dataset": "cartoon", "dataroot": None}
    torch.save(state | {"options": drawn}, run / "checkpoint.pth")
    assert parse(run, "--resume")[0].dataset == "cartoon"
    words = f"the run in {run} draws its images; start a new run for others"
    assert_refused(lambda: parse(run, "--dataroot", "photos", "--resume"), capsys, words)


def test_paths_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    """Shells leave the ~ of --outf=~/x as it is."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    options, _ = parse("x", *(f"--{name}=~/{name}" for name in ("outf", "dataroot", "cache", "netG", "netD")))
    for name in ("outf", "dataroot", "cache", "netG", "netD"):
        assert Path(getattr(options, name)) == tmp_path / name
    assert parse("x", "--cache", "none")[0].cache == "none"


def test_help_fits_a_terminal_and_needs_no_docstrings(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for program in (dcgan, generate):
        monkeypatch.setattr(program, "__doc__", None)  # as under python -OO
        with pytest.raises(SystemExit, match="0"):
            program.main(["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) > 10
        assert max(map(len, lines)) <= 80


def test_channels_and_seed_that_are_not_given_are_chosen(tmp_path):
    grey = {name for name in SOURCES if parse(tmp_path, "--dataset", name)[0].nc == 1}
    assert grey == {"mnist", "fashion-mnist", "kmnist"}
    assert parse(tmp_path, "--dataset", "mnist", "--nc", 3)[0].nc == 3
    seeds = {parse(tmp_path)[0].manual_seed for _ in range(20)}
    assert len(seeds) > 10
    assert all(1 <= seed < 10_000 for seed in seeds)


def test_omitted_options_keep_the_values_of_the_run(run):
    options, checkpoint = parse(run, "--resume", "--niter", 9, "--workers", 1)
    assert checkpoint["epoch"] == 3
    saved = {name: checkpoint["options"][name] for name in SAVED_OPTIONS}
    assert {name: getattr(options, name) for name in SAVED_OPTIONS} == saved | {"niter": 9, "workers": 1}
    assert (options.netG, options.netD, options.cuda, options.ngpu) == (None, None, False, 1)
    options, _ = parse(run, "--resume", "--netG", "elsewhere.pth")  # as at the start: it has its own by now
    assert options.netG is None
    again, _ = parse(run, *RUN, "--resume")  # everything repeated
    assert {name: getattr(again, name) for name in SAVED_OPTIONS} == saved


def test_the_folder_of_the_images_is_no_run_folder(tmp_path, capsys):
    words = f"--outf {tmp_path} is --dataroot, the folder of the images; choose another --outf"
    assert_refused(lambda: parse(tmp_path, "--dataroot", f"{tmp_path}/../{tmp_path.name}"), capsys, words)


def test_resume_starts_a_run_where_there_is_none(tmp_path):
    options, checkpoint = parse(tmp_path / "new", "--resume", "--netG", "weights.pth")
    assert checkpoint is None
    assert options.netG == "weights.pth"


# Requests that cannot work


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Weights and folders that requests can name, good and bad."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "empty").mkdir(parents=True)
    (folder / "lsun" / "church_train_lmdb").mkdir(parents=True)
    (folder / "lsun" / "church_train_lmdb" / "data.mdb").touch()
    netG, netD = Generator(10, 8, 3, 16), Discriminator(8, 3, 16)
    torch.save(netG.state_dict(), folder / "G.pth")
    torch.save(netD.state_dict(), folder / "D.pth")
    torch.save({name: t * float("nan") for name, t in netG.state_dict().items()}, folder / "nan.pth")
    (folder / "page.pth").write_text("<!DOCTYPE html>")
    (folder / "foreign").mkdir()
    torch.save({"model": netG.state_dict()}, folder / "foreign" / "checkpoint.pth")
    return folder


NUMBERS = {  # values out of range
    "--imageSize": "0 x 1.5",
    "--batchSize": "0 -1",
    "--workers": "-1",
    "--niter": "0 -1",
    "--lr": "inf nan -1",
    "--beta1": "1 -0.1 nan",
    "--ema": "1 nan",
    "--nz": "0",
    "--ngf": "0",
    "--ndf": "0",
    "--nc": "2",
    "--crop": "-1 x",
    "--fid": "-1",
    "--log-every": "0",
    "--save-every": "0",
    "--keep": "-1 x",
    "--manualSeed": "-1 99999999999999999999",
    "--precision": "fp16",
}
REFUSED = [(f"{option} {value}", option) for option, values in NUMBERS.items() for value in values.split()]
REFUSED += [
    ("--imageSize 65", "--imageSize 65 is not possible"),
    ("--imageSize 65", "64 and 80"),
    ("--augment color,flip", "--augment: must be one or more of color, translation, cutout"),
    ("--nonsense", "--nonsense"),
    ("--dataset nonsense", "cartoon"),
    ("--dataset lsun --classes tower --dataroot {m}/lsun", "church"),
    ("--dataset folder", "--dataroot"),
    ("--dataroot {m}/nowhere", "{m}/nowhere"),
    ("--dataroot {m}/empty", "no images"),
    (f"--dataroot {'a' * 300}", "there is no such folder"),
    (
        "--dataset cartoon --dataroot {m}",
        "--dataroot has no effect here: cartoon images are drawn; a folder of images is",
    ),
    ("--crop 20", "--crop has no effect here: cartoon images are made in the size of --imageSize"),
    ("--dataset fake --crop 20", "--crop has no effect here: fake images"),
    ("--dataroot {m}/G.pth", "{m}/G.pth is a file; --dataroot takes a folder of images, an archive (.zip"),
    ("--classes church", "--classes has no effect here: only --dataset lsun has classes"),
    ("--dataset mnist --dataroot {m} --classes church", "--classes"),
    ("--sync-bn", "--sync-bn has no effect here: one process has the whole batch; --ngpu N starts N processes"),
    ("--dataset folder --dataroot {m}/nowhere", "{m}/nowhere"),
    ("--dataset folder --dataroot {m}/empty", "no images"),
    ("--outf {m}/G.pth", "--outf"),
    ("--outf {m}/G.pth/below", "--outf"),
    ("--outf {m}/foreign --resume", "checkpoint.pth"),
    ("--ngpu 1000", "--ngpu"),
    ("--ngpu 3", "--batchSize 128 cannot be shared evenly by 3 processes (--ngpu); use 126 or 129"),
    ("--ngpu 3 --batchSize 2", "--batchSize 2 cannot be shared evenly by 3 processes (--ngpu); use 3"),
    (f"{SMALL} --ngf 16 --netG {{m}}/G.pth", "G.pth: its network has --ngf 8; give the same options"),
    (f"{SMALL} --imageSize 32 --netD {{m}}/D.pth", "D.pth: its network has --imageSize 16; give the same options"),
    (f"{SMALL} --netG {{m}}/D.pth", "it holds a discriminator"),
    (f"{SMALL} --netD {{m}}/G.pth", "it holds a generator"),
    (f"{SMALL} --netG {{m}}/nan.pth", "not finite"),
    (f"{SMALL} --netG {{m}}/page.pth", "page.pth"),
    (f"{SMALL} --netG {{m}}/nowhere.pth", "no such file"),
]
REFUSED += (
    [] if torch.cuda.is_available() else [("--cuda", "--cuda"), ("--cuda --ngpu 2", "torch finds 0 CUDA devices")]
)


@pytest.mark.parametrize(("command", "words"), REFUSED)
def test_requests_that_cannot_work_are_refused(tmp_path, monkeypatch, capsys, material, command, words):
    monkeypatch.chdir(tmp_path)
    before = hashes(material)
    arguments = ["--cache", "cache", *command.format(m=material).split()]
    assert_refused(lambda: dcgan.main(arguments), capsys, words.format(m=material))
    assert list(tmp_path.iterdir()) == []
    assert hashes(material) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "--lr", 0.1], "has --lr 0.0002, not 0.1; leave out what differs"),
        (["--resume", "--ngf", 16, "--nz", 7], "--nz 10, not 7; --ngf 8, not 16"),
        (["--resume", "--dataset", "cartoon"], "--dataset fake, not cartoon"),
        (["--resume", "--manualSeed", 4], "--manualSeed 3, not 4"),
        (["--resume", "--niter", 9, "--dry-run"], "--dry-run would add a step"),
        (RUN, "add --resume to continue it, or choose another --outf"),
    ],
)
def test_old_runs_are_neither_changed_nor_overwritten(unbroken, capsys, arguments, words):
    before = hashes(unbroken)
    assert_refused(lambda: run_dcgan(unbroken, *arguments), capsys, words)
    assert hashes(unbroken) == before


@pytest.mark.parametrize(
    "option",
    [
        "--dataset mnist",
        "--classes church",
        "--imageSize 32",
        "--crop 20",
        "--nc 1",
        "--nz 7",
        "--ngf 7",
        "--ndf 7",
        "--batchSize 7",
    ]
    + ["--lr 0.5", "--beta1 0.75", "--ema 0.5", "--flip", "--augment color", "--sync-bn", "--manualSeed 7"],
)
def test_what_makes_a_run_may_not_change(unbroken, capsys, option):
    before = hashes(unbroken)
    assert_refused(lambda: run_dcgan(unbroken, "--resume", *option.split()), capsys, f"has {option.split()[0]} ")
    assert hashes(unbroken) == before


@pytest.mark.parametrize(("option", "before", "now"), [("augment", "none", "color"), ("crop", 0, 108)])
def test_a_run_of_an_earlier_version_has_no_augmentation_and_no_crop(run, capsys, option, before, now):
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    assert state["options"].pop(option) == before
    torch.save(state, run / "checkpoint.pth")
    assert getattr(parse(run, "--resume")[0], option) == before
    words = f"has --{option} {before}, not {now}"
    assert_refused(lambda: parse(run, "--resume", f"--{option}", now), capsys, words)


def test_only_distances_of_equally_many_samples_are_compared(run, capsys, monkeypatch):
    monkeypatch.setattr("support.options.check_installed", lambda: None)
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    assert parse(run, "--resume", "--fid", 64)[0].fid == 64  # it did not measure until now
    torch.save(state | {"options": state["options"] | {"fid": 32}}, run / "checkpoint.pth")
    assert_refused(lambda: parse(run, "--resume", "--fid", 64), capsys, "has --fid 32, not 64; leave out what")
    for arguments, fid in (([], 32), (["--fid", 32], 32), (["--fid", 0], 0)):
        assert parse(run, "--resume", *arguments)[0].fid == fid


def test_processes_that_a_launcher_started_share_the_batch(tmp_path, capsys, monkeypatch):
    assert parse(tmp_path, "--batchSize", 9, world_size=3)[0].batch_size == 9
    assert parse(tmp_path, "--batchSize", 12, "--sync-bn", world_size=3)[0].sync_bn
    assert parse(tmp_path, "--ngpu", 2, "--sync-bn")[0].sync_bn
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for processes in (1, 2, 4):  # 2 on each of two machines
        assert parse(tmp_path, "--ngpu", processes, world_size=4)[0].ngpu == processes
    words = "--ngpu has no effect here: torchrun has started 4 processes"
    assert_refused(lambda: parse(tmp_path, "--ngpu", 8, world_size=4), capsys, words)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    words = "--batchSize 8 cannot be shared evenly by 3 processes (--ngpu); use 6 or 9"
    assert_refused(lambda: parse(tmp_path, "--batchSize", 8, world_size=3), capsys, words)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert_refused(lambda: parse(tmp_path, "--accel", "--ngpu", 2), capsys, "leave --accel out")
    assert parse(tmp_path, "--accel")[0].accel

"""dcgan.py: a run from its options to its files, stopped by signals and kills, and resumed exactly."""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import time
import types

import pytest
import torch
from helpers import (
    BATCH,
    EPOCHS,
    FOLDER,
    IMAGES,
    ROOT,
    RUN,
    SMALL,
    assert_refused,
    assert_same,
    assert_same_run,
    checkpoint,
    files,
    fork,
    hashes,
    log_rows,
    public_discriminator,
    public_generator,
    run_dcgan,
    run_dcgan_forked,
    start,
    write_images,
)
from PIL import Image

import dcgan
import support.distributed
import support.files
import support.progress
from models import Discriminator, Generator
from support.errors import UserError
from support.weights import read_file

STEPS = 63  # an epoch of RUN
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="signals and terminals as Linux has them")


def without_speed(rows):
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows]


@pytest.fixture(scope="module")
def first_epoch(tmp_path_factory):
    """The folder of the first epoch of RUN; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("first") / "out"
    assert run_dcgan(folder, *RUN, "--niter", 1, "--resume") == 0  # where there is nothing to resume, it starts
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory, few_steps):
    """The folder of a run of few_steps; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("short") / "out"
    assert run_dcgan(folder, *few_steps) == 0
    return folder


def start_in_terminal(folder, *arguments):
    """Start dcgan.py in a terminal of its own; return the process, and the terminal's other end."""
    import fcntl
    import termios

    master, slave = os.openpty()
    os.set_blocking(master, False)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # lines and columns
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, ROOT / "dcgan.py", *arguments],
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": str(folder.parent / "cache")},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
    )
    os.close(slave)
    return process, master


def stop_runs(base):
    """Start four runs of RUN in `base`, end each by a signal, write {signal: (exit code, what it said)} to ends.json.

    One loses its terminal. Nobody reads the standard output of another: a Ctrl-C under `| tee` ends tee as well.
    """
    forked = {name: fork(run_dcgan_forked, base / name, *RUN) for name in ("SIGKILL", "SIGTERM")}
    piped = start(base / "SIGINT", "dcgan.py", *RUN)
    piped.stdout.close()
    in_terminal, terminal = start_in_terminal(base / "SIGHUP", *RUN)
    pids = {"SIGINT": piped.pid, "SIGHUP": in_terminal.pid} | {name: forked[name].pid for name in forked}
    shown = b""

    def is_due(name):
        out = base / name / "out"
        if name == "SIGKILL":  # once an epoch is saved
            return (out / "checkpoint.prev.pth").exists() and (out / "checkpoint.pth").exists()
        lines = {"SIGTERM": 10, "SIGINT": 2, "SIGHUP": 6}  # of the log: in the third, first and second epoch
        return (out / "log.csv").exists() and (out / "log.csv").read_text().count("\n") > lines[name]

    due, end = list(pids), time.monotonic() + 100
    while due and time.monotonic() < end:
        if "SIGHUP" in due:
            with contextlib.suppress(BlockingIOError):
                shown += os.read(terminal, 1 << 16)
        for name in filter(is_due, list(due)):
            due.remove(name)
            if name == "SIGHUP":
                os.close(terminal)  # the kernel sends it
            else:
                os.kill(pids[name], getattr(signal, name))
        time.sleep(0.002)
    ends = {"SIGINT": (piped.communicate(timeout=100)[1], piped.returncode)}
    ends["SIGHUP"] = (shown.decode(), in_terminal.wait(100))
    for name, process in forked.items():
        process.join(100)
        ends[name] = ((base / name / "errors").read_text(), process.exitcode)
    (base / "ends.json").write_text(json.dumps({name: (code, said) for name, (said, code) in ends.items()}))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A function of "SIGKILL", "SIGTERM", ... that returns (run folder, exit code, what it said) of a stopped run.

    The first test of this file starts the runs; they run beside the tests that do not need them yet.
    """
    base = tmp_path_factory.mktemp("stopped")
    if sys.platform != "linux":
        yield
        return
    process = fork(stop_runs, base)

    def end_of(name):
        process.join(200)
        code, said = json.loads((base / "ends.json").read_text())[name]
        return base / name / "out", code, said

    yield end_of
    process.join(200)


# The run folder


@pytest.mark.usefixtures("stopped")
def test_the_run_folder_holds_what_files_md_says(unbroken):
    names = [f"{net}_epoch_{epoch}.pth" for net in ("netG", "netD", "netG_ema") for epoch in range(EPOCHS)]
    names += [f"fake_samples_epoch_{epoch:03d}.png" for epoch in range(EPOCHS)]
    names += ["args.json", "checkpoint.prev.pth", "checkpoint.pth", "log.csv", "losses.png", "progress.gif"]
    names += ["real_samples.png", "report.html"]
    assert [path.name for path in files(unbroken) if path.name != ".lock"] == sorted(names)
    settings = json.loads((unbroken / "args.json").read_text())
    expected = {"batch_size": BATCH, "manual_seed": 3, "lr": 0.0002, "nc": 3, "image_size": 16, "niter": EPOCHS}
    assert expected.items() <= settings.items()
    assert settings["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
    }


def test_the_log_has_a_row_for_every_twenty_steps_and_for_the_end_of_an_epoch(unbroken):
    rows = log_rows(unbroken)
    columns = ["epoch", "step", "images", "loss_D", "loss_D_real", "loss_D_fake", "loss_G"]
    assert list(rows[0]) == [*columns, "D_x", "D_G_z1", "D_G_z2", "images_per_s"]
    places = [(epoch, step) for epoch in range(EPOCHS) for step in (20, 40, 60, STEPS)]
    expected = [(e, STEPS * e + s, IMAGES * e + min(IMAGES, BATCH * s)) for e, s in places]
    assert [(row["epoch"], row["step"], row["images"]) for row in rows] == expected
    for row in rows:
        assert all(0 < row[name] < 1 for name in ("D_x", "D_G_z1", "D_G_z2"))
        assert min(row["loss_D_real"], row["loss_D_fake"], row["loss_G"], row["images_per_s"]) > 0
        assert row["loss_D"] == pytest.approx(row["loss_D_real"] + row["loss_D_fake"], rel=1e-5)


def test_training_waits_for_no_slow_import(tmp_path):
    """torchvision takes nearly as long as torch; matplotlib draws the curves, after the first epoch."""
    command = [*RUN, "--outf", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    program = f"import sys, dcgan\ndcgan.train_epoch = lambda *_: sys.exit(print(*sys.modules))\ndcgan.main({command})"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "torch" in found.stdout.split()
    assert not {"torchvision", "matplotlib"} & set(found.stdout.split())


def test_weights_files_are_plain_state_dicts(unbroken):
    networks = {"netG": Generator(10, 8, 3, 16), "netG_ema": Generator(10, 8, 3, 16), "netD": Discriminator(8, 3, 16)}
    newest = checkpoint(unbroken)
    for role, net in networks.items():
        state = torch.load(unbroken / f"{role}_epoch_{EPOCHS - 1}.pth", weights_only=True)
        assert type(state) is dict
        assert list(state) == list(net.state_dict())
        for name, t in state.items():
            assert t.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
            assert t.is_contiguous()
            assert t.device.type == "cpu"
            assert torch.equal(t, newest[role][name]) or (role, name) == (
                "netG_ema",
                "main.6.weight",
            )  # has the contrast
        net.load_state_dict(state)


def test_grids_show_64_images_of_every_epoch_and_the_animation_shows_all_grids(unbroken):
    side = 8 * (16 + 2) + 2  # 8 x 8 images with a border of two pixels
    grids = [Image.open(unbroken / f"fake_samples_epoch_{epoch:03d}.png") for epoch in range(EPOCHS)]
    grids.append(Image.open(unbroken / "real_samples.png"))
    assert [(grid.size, grid.mode) for grid in grids] == [((side, side), "RGB")] * (EPOCHS + 1)
    assert len({grid.tobytes() for grid in grids}) == EPOCHS + 1
    assert Image.open(unbroken / "progress.gif").n_frames == EPOCHS
    Image.open(unbroken / "losses.png").load()


def test_epochs_between_two_saves_leave_no_files(tmp_path, few_steps):
    folder = tmp_path / "out"
    assert run_dcgan(folder, *few_steps, "--niter", 5, "--save-every", 2) == 0
    assert sorted(path.name for path in folder.glob("netG_epoch_*")) == [f"netG_epoch_{i}.pth" for i in (1, 3, 4)]
    assert [row["step"] for row in log_rows(folder)] == list(range(1, 16))


# Stopped by a signal, and resumed


def test_a_run_that_resumes_nothing_says_so(tmp_path, capsys):
    assert run_dcgan(tmp_path / "new", *RUN, "--resume", "--dry-run") == 0
    assert f"note: --resume: {tmp_path / 'new'} holds no run yet; this starts one\n" in capsys.readouterr().out


def test_a_longer_run_equals_an_unbroken_one(tmp_path, first_epoch, unbroken):
    folder = shutil.copytree(first_epoch, tmp_path / "out")
    assert run_dcgan(folder, *RUN, "--resume") == 0
    assert_same_run(folder, unbroken)
    assert without_speed(log_rows(folder)) == without_speed(log_rows(unbroken))
    assert json.loads((folder / "args.json").read_text())["niter"] == EPOCHS
    before = hashes(folder)
    assert run_dcgan(folder, "--resume") == 0  # nothing is left to do
    changed = {name for name, value in hashes(folder).items() if before[name] != value}
    assert changed <= {"args.json", "progress.gif", "report.html"}


def test_a_run_killed_before_its_first_save_keeps_its_options_and_seed(tmp_path, first_epoch, monkeypatch):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "train", lambda *_: 0)  # killed there
        assert run_dcgan(folder, *RUN) == 0
    assert run_dcgan(folder, "--resume", "--niter", 1) == 0
    assert_same_run(folder, first_epoch)


@needs_linux
def test_a_signal_in_the_last_step_of_an_epoch_finds_the_epoch_saved(tmp_path, first_epoch, monkeypatch):
    folder, step = tmp_path / "out", dcgan.Trainer.step

    def step_and_signal(trainer, batch):
        result = step(trainer, batch)
        if trainer.steps_taken == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(dcgan.Trainer, "step", step_and_signal)
    assert run_dcgan(folder, *RUN) == 143
    assert [checkpoint(folder)[name] for name in ("epoch", "step")] == [1, 0]
    assert (folder / "netG_epoch_0.pth").is_file()
    assert_same_run(folder, first_epoch)  # which the tests above resume
    assert without_speed(log_rows(folder)) == without_speed(log_rows(first_epoch))


@needs_linux
def test_a_stopped_run_that_decodes_at_every_use_resumes_exactly(tmp_path, few_steps, short, monkeypatch, capsys):
    folder, step = tmp_path / "out", dcgan.Trainer.step
    options = [*few_steps, "--cache", "none", "--workers", 2]

    def step_and_signal(trainer, batch):
        if trainer.steps_taken == 4:  # in the second epoch
            os.kill(os.getpid(), signal.SIGHUP)
        return step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(dcgan.Trainer, "step", step_and_signal)
        assert run_dcgan(folder, *options) == 129
    assert capsys.readouterr().err == f"SIGHUP: saved in {folder}; --resume continues at epoch 2, step 3\n"
    assert checkpoint(folder)["steps"] == 5
    assert run_dcgan(folder, *options, "--resume") == 0
    assert_same_run(folder, short)  # which has a cache


@needs_linux
def test_a_signal_between_an_epoch_and_its_save_finds_the_epoch_saved(tmp_path, few_steps, short, monkeypatch):
    """Also of an epoch that would not have been saved."""
    summary, options = dcgan.progress.epoch_summary, [*few_steps, "--save-every", 9]

    def summary_and_signal(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return summary(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dcgan.progress, "epoch_summary", summary_and_signal)
        assert run_dcgan(tmp_path / "out", *options) == 143
    assert [checkpoint(tmp_path / "out")[name] for name in ("epoch", "step", "steps")] == [1, 0, 3]
    assert (tmp_path / "out" / "netG_epoch_0.pth").is_file()
    assert run_dcgan(tmp_path / "out", "--resume") == 0
    assert_same_run(tmp_path / "out", short)


@needs_linux
def test_a_signal_while_the_processes_agree_is_not_lost(tmp_path, few_steps, monkeypatch):
    """It comes inside the very call that asks whether one has come."""
    first = iter([True])

    def interrupted(number):
        if next(first, False):
            signal.raise_signal(signal.SIGTERM)
        return number

    monkeypatch.setattr(support.distributed, "all_reduce_max", interrupted)
    assert run_dcgan(tmp_path / "out", *few_steps) == 143
    assert checkpoint(tmp_path / "out")["steps"] == 2


@needs_linux
@pytest.mark.parametrize("error", [KeyboardInterrupt, signal.SIGTERM])
def test_a_signal_before_training_ends_the_program_with_nothing_written(tmp_path, monkeypatch, capsys, error):
    def interrupt(*_):
        if isinstance(error, signal.Signals):
            signal.raise_signal(error)
        raise KeyboardInterrupt

    monkeypatch.setattr(dcgan, "set_up", interrupt)
    if error is KeyboardInterrupt:
        assert run_dcgan(tmp_path / "out", *RUN) == 130
        assert capsys.readouterr().err == "dcgan.py: interrupted before training started\n"
    else:
        with pytest.raises(SystemExit, match="143"):
            run_dcgan(tmp_path / "out", *RUN)
    assert list(tmp_path.iterdir()) == []


@needs_linux
def test_a_killed_run_resumes_exactly(stopped, unbroken, monkeypatch):
    folder, code, _ = stopped("SIGKILL")
    assert code == -signal.SIGKILL
    position = checkpoint(folder)["epoch"]
    assert 0 < position < EPOCHS
    (folder / ".netG_epoch_1.pth.1234.part").write_bytes(b"as a kill in the middle of a save leaves it")
    with open(folder / "log.csv", "a") as log:  # rows of steps that will be taken again, the last cut off
        log.write(f"{position},{STEPS * position + 20},1,9,9,9,9,9,9,9,9,\n{position},{STEPS * position + 40},1,9")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parents[1] / "cache"))
    assert dcgan.main(["--resume"]) == 0  # every omitted option comes from the checkpoint
    assert_same_run(folder, unbroken)
    assert without_speed(log_rows(folder)) == without_speed(log_rows(unbroken))
    assert [path.name for path in files(folder)] == [path.name for path in files(unbroken)]
    images = [path for path in files(unbroken) if path.suffix == ".png" and path.name != "losses.png"]
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in images)


def test_a_finished_run_keeps_the_record_of_its_options(tmp_path, capsys):
    options = [*SMALL.split(), "--workers", 0, "--niter", 2]
    assert run_dcgan(tmp_path / "out", *options) == 0
    files = {name: (tmp_path / "out" / name).read_bytes() for name in ("args.json", "checkpoint.pth", "report.html")}
    assert run_dcgan(tmp_path / "out", "--resume", "--niter", 1, "--no-contrast") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in files.items())


def test_a_run_killed_before_its_last_page_gets_one_when_it_resumes(tmp_path):
    assert run_dcgan(tmp_path / "out", *SMALL.split(), "--workers", 0, "--niter", 1) == 0
    page = tmp_path / "out" / "report.html"
    finished = page.read_text(encoding="utf-8").count("Finished")
    assert finished > 0
    page.write_text("as it was while the run trained", encoding="utf-8")
    assert run_dcgan(tmp_path / "out", "--resume") == 0
    assert page.read_text(encoding="utf-8").count("Finished") == finished


@needs_linux
@pytest.mark.parametrize(("name", "code", "epoch"), [("SIGTERM", 143, 2), ("SIGINT", 130, 0)])
def test_a_stopped_run_saves_and_resumes_exactly(stopped, unbroken, name, code, epoch):
    folder, exit_code, errors = stopped(name)
    assert exit_code == code
    _, announcement, end = errors.splitlines()
    assert announcement.startswith(f"{name}: finishing this step, then saving; the next signal")
    assert end.startswith(f"{name}: saved in out; --resume continues at epoch {epoch + 1}, step ")
    state = checkpoint(folder)
    assert state["epoch"] == epoch
    assert state["step"] > 0  # in the middle of an epoch
    assert state["steps"] == STEPS * epoch + state["step"]
    assert run_dcgan(folder, "--resume") == 0
    assert_same_run(folder, unbroken)


@needs_linux
def test_a_run_whose_terminal_goes_away_saves_and_resumes_exactly(stopped, unbroken):
    folder, code, shown = stopped("SIGHUP")
    assert "epoch 1/3: loss_D" in shown
    assert "img/s" in shown  # the progress bar
    assert code == 129
    state = checkpoint(folder)
    assert state["epoch"] == 1
    assert state["steps"] == STEPS + state["step"] > STEPS
    assert run_dcgan(folder, "--resume") == 0
    assert_same_run(folder, unbroken)


def other_moments(state):
    next(iter(state["optimizerG"]["state"].values()))["exp_avg"] = torch.zeros(3)


def other_networks(state):
    state["netG"] = Generator(10, 16, 3, 16).state_dict()


def no_noise(state):
    del state["noise"]


def other_images(state):
    state["pictures"] = 999


@pytest.mark.parametrize("change", [other_moments, other_networks, no_noise, other_images])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, short, capsys, change):
    folder = shutil.copytree(short, tmp_path / "out")
    state = checkpoint(folder)
    change(state)
    torch.save(state, folder / "checkpoint.pth")
    before = hashes(folder)
    words = f"dcgan.py: --resume: the checkpoint in {folder} does not fit these networks"
    if change is other_images:
        words = "dcgan.py: --resume: the run had 999 images, now there are 96"
    assert_refused(lambda: run_dcgan(folder, "--resume", "--niter", "9"), capsys, words)
    assert hashes(folder) == before


# Options that change a run


def test_without_a_cache_the_weights_are_the_same(tmp_path, first_epoch):
    assert run_dcgan(tmp_path / "out", *RUN, "--cache", "none", "--niter", 1) == 0
    assert_same_run(tmp_path / "out", first_epoch)


def test_the_precision_may_change_when_a_run_resumes(tmp_path, few_steps, capsys):
    folder = tmp_path / "out"
    assert run_dcgan(folder, *few_steps, "--niter", 1) == 0
    assert "--precision   fp32" in capsys.readouterr().out
    for options in (["--niter", 2, "--precision", "bf16"], ["--niter", 3]):  # it is kept
        assert run_dcgan(folder, "--resume", *options) == 0
        assert "--precision   bf16" in capsys.readouterr().out
    assert checkpoint(folder)["steps"] == 9


def test_mirrored_images_depend_on_the_seed_and_resume_exactly(tmp_path, few_steps, short):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_dcgan(one, *few_steps, "--flip") == 0
    assert run_dcgan(two, *few_steps, "--flip", "--niter", 1) == 0
    assert run_dcgan(two, "--resume", "--niter", 2) == 0
    assert_same_run(two, one)
    mirrored, plain = (checkpoint(folder)["netD"]["main.0.weight"] for folder in (one, short))
    assert not torch.equal(mirrored, plain)


@pytest.mark.parametrize("given", ["netG", "netD"])
def test_a_run_starts_from_the_weights_that_it_is_given(tmp_path, few_steps, unbroken, capsys, given):
    weights = unbroken / f"{given}_epoch_1.pth"
    assert run_dcgan(tmp_path / "out", *few_steps, f"--{given}", weights, "--lr", 0, "--dry-run") == 0
    other = "netD" if given == "netG" else "netG"
    assert capsys.readouterr().err.startswith(f"warning: --{other} is not given: that network starts untrained")
    saved, start_weights = (read_file(path) for path in (tmp_path / "out" / f"{given}_epoch_0.pth", weights))
    learned = [name for name in saved if name.endswith(("weight", "bias"))]
    assert all(torch.equal(saved[name], start_weights[name]) for name in learned)  # lr 0 keeps them


@needs_linux
def test_without_a_compiler_a_run_warns_once_and_goes_on(tmp_path, few_steps, short):
    nothing = {"CXX": "no-such-compiler", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    process = fork(run_dcgan_forked, tmp_path / "run", *few_steps, "--niter", 1, "--compile", **nothing)
    process.join(100)
    assert process.exitcode == 0
    errors = (tmp_path / "run" / "errors").read_text()
    assert errors.startswith("warning: --compile is not possible here; continuing without it (")
    assert errors.count("\n") == 1
    assert_same(*(read_file(folder / "netG_epoch_0.pth") for folder in (tmp_path / "run" / "out", short)))


def test_the_public_examples_command_line_works_and_its_networks_load_the_weights(tmp_path, monkeypatch):
    write_images(tmp_path / "photos" / "a class", *(f"{i}.png" for i in range(70)))
    command = "--dataset folder --dataroot photos --batchSize 64 --imageSize 64 --niter 1 --outf o --manualSeed 1"
    command += " --workers 2 --nz 100 --ngf 8 --ndf 8 --lr 0.0002 --beta1 0.5 --ngpu 1 --classes bedroom --accel"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert dcgan.main(command.split()) == 0
    public_generator(100, 8, 3).load_state_dict(torch.load("o/netG_epoch_0.pth"), strict=True)
    public_discriminator(8, 3).load_state_dict(torch.load("o/netD_epoch_0.pth"), strict=True)


@pytest.mark.parametrize(
    "size", [16, 28, 32, 64, 96, *(pytest.param(size, marks=pytest.mark.slow) for size in (128, 256))]
)
def test_every_size_trains(tmp_path, size):
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(3)))
    options = f"--dataset folder --imageSize {size} --nz 4 --ngf 2 --ndf 2 --workers 0 --dry-run"
    assert run_dcgan(tmp_path / "out", "--dataroot", tmp_path / "in", *options.split()) == 0
    columns = int(max(4, min(64, (1024 // size) ** 2)) ** 0.5)
    side = columns * (size + 2) + 2
    assert Image.open(tmp_path / "out" / "fake_samples_epoch_000.png").size == (side, side)
    assert checkpoint(tmp_path / "out")["steps"] == 1


@needs_linux
@pytest.mark.parametrize(("ends_with", "code"), [("the last epoch", 0), ("a signal", 143), ("an error", 1)])
def test_a_trainer_is_closed_unless_training_fails(tmp_path, few_steps, monkeypatch, ends_with, code):
    """NCCL would wait for ever if a process left its job before. A failed one does not leave it, and must not wait."""
    closed, epoch_summary = [], dcgan.progress.epoch_summary

    def summary(*arguments):
        if ends_with == "a signal":
            signal.raise_signal(signal.SIGTERM)
        if ends_with == "an error":
            raise UserError("another process was lost")
        return epoch_summary(*arguments)

    monkeypatch.setattr(dcgan.progress, "epoch_summary", summary)
    monkeypatch.setattr(dcgan.Trainer, "close", lambda trainer: closed.append(trainer))
    assert run_dcgan(tmp_path / "out", *few_steps) == code
    assert len(closed) == (code != 1)


# What a run says


def test_a_diverged_run_ends_before_anything_of_it_is_saved(tmp_path, few_steps, capsys):
    assert run_dcgan(tmp_path / "out", *few_steps, "--lr", 1e30) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("dcgan.py: ")
    assert errors.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*.pth")] == ["checkpoint.pth"]
    assert checkpoint(tmp_path / "out")["steps"] == 0  # that of the start


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_too_little_memory_is_told_in_one_line(tmp_path, few_steps, monkeypatch, capsys, error):
    """In PyTorch, and in Python or NumPy; test_faults.py has a real limit."""

    def step(*_):
        raise error

    monkeypatch.setattr(dcgan.Trainer, "step", step)
    assert run_dcgan(tmp_path / "out", *few_steps) == 1
    assert (
        capsys.readouterr().err == "dcgan.py: out of memory with --batchSize 32; try a smaller one, in another --outf\n"
    )


def test_too_little_memory_for_a_checkpoint_is_told_in_one_line(tmp_path, few_steps, monkeypatch, capsys):
    """What torch.save raises then is no MemoryError."""

    class SmallBytesIO(io.BytesIO):
        def write(self, content):
            if self.tell() > 20_000:
                raise MemoryError
            return super().write(content)

    monkeypatch.setattr(support.files, "io", types.SimpleNamespace(BytesIO=SmallBytesIO))
    assert run_dcgan(tmp_path / "out", *few_steps) == 1
    assert (
        capsys.readouterr().err == "dcgan.py: out of memory with --batchSize 32; try a smaller one, in another --outf\n"
    )
    assert list(tmp_path.rglob("*.pth")) == []


def test_the_hint_that_D_wins_comes_once(tmp_path, capsys, monkeypatch):
    """G cannot move, and D learns to tell its images from images of one color."""
    monkeypatch.setattr(support.progress, "HINT_STEPS", 60)
    (tmp_path / "in").mkdir()
    for i in range(16):
        Image.new("RGB", (16, 16), (255, i, 0)).save(tmp_path / "in" / f"{i}.png")

    def trainer_of_a_helpless_generator(*arguments, trainer=dcgan.Trainer):
        trainer = trainer(*arguments)
        trainer.optimizerG.param_groups[0]["lr"] = 0.0
        return trainer

    monkeypatch.setattr(dcgan, "Trainer", trainer_of_a_helpless_generator)
    options = f"--dataroot {tmp_path / 'in'} --batchSize 8 --niter 60 --lr 0.01 --save-every 60 --log-every 5"
    assert run_dcgan(tmp_path / "out", *FOLDER, *options.split(), "--manualSeed", 1) == 0
    assert capsys.readouterr().err.count("hint: for ") == 1


def test_a_run_works_where_the_output_is_no_file(tmp_path, few_steps):
    said = io.StringIO()  # as in a notebook
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert run_dcgan(tmp_path / "out", *few_steps) == 0
    assert "epoch 2/2" in said.getvalue()

"""The two programs as people run them: the run folder, exact continuation, refusals, and the pictures in the end."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import write
from test_models import public_discriminator, public_generator
from test_training import assert_same

import dcgan
import generate
from models import Discriminator, Generator, load_generator
from support.errors import UserError
from support.run_folder import LOG_FIELDS, RunFolder

REPOSITORY = Path(__file__).parents[1]
PICTURES, BATCH, EPOCHS = 1000, 16, 3  # 63 steps an epoch, the last of 8 pictures
SMALL = "--dataset fake --imageSize 16 --nz 10 --ngf 8 --ndf 8"
RUN = f"{SMALL} --workers 0 --log-every 20 --manualSeed 3 --batchSize {BATCH} --niter {EPOCHS}".split()
EXACT = ("netG", "netD", "netG_ema", "optimizerG", "optimizerD", "noise", "steps", "epoch", "step")


def start(folder, program, *arguments):
    """Start a program in `folder`, with one thread and a cache of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder.parent / "cache")}
    command = [sys.executable, str(REPOSITORY / program), *map(str, arguments)]
    folder.mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def finish(process, code=0, seconds=100):
    """Wait for its end, check its exit code, and return what it wrote to standard error."""
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == code, output + errors
    assert "Traceback" not in errors
    return errors


def wait_for(condition, process):
    for _ in range(20_000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.003)
    pytest.fail("nothing happened for a minute")


def here(folder, *arguments):
    """Run dcgan.py in this process, its run folder being `folder`; return its exit code."""
    own = [] if "--cache" in arguments else ["--cache", folder.parent / "cache" / "dcgan"]
    return dcgan.main([str(a) for a in ("--outf", folder, *own, *arguments)])


def hashes(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files(folder)}


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def assert_same_run(folder, expected):
    """Check that two runs' checkpoints are equal bit for bit in all that training changes."""
    assert_same(*({part: checkpoint(f)[part] for part in EXACT} for f in (folder, expected)))


def log_rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def without_speed(rows):
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def unbroken(base):
    """The folder of a run that was never stopped; tests leave it as it is."""
    finish(start(base / "unbroken", "dcgan.py", *RUN))
    return base / "unbroken" / "out"


# The run folder


def test_run_folder_holds_what_the_design_says(unbroken):
    names = [f"{net}_epoch_{epoch}.pth" for net in ("netG", "netD", "netG_ema") for epoch in range(EPOCHS)]
    names += [f"fake_samples_epoch_{epoch:03d}.png" for epoch in range(EPOCHS)]
    names += ["args.json", "checkpoint.prev.pth", "checkpoint.pth", "log.csv", "losses.png", "progress.gif"]
    names += ["real_samples.png"]
    assert [p.name for p in files(unbroken) if p.name != ".lock"] == sorted(names)
    settings = json.loads((unbroken / "args.json").read_text())
    expected = {"batch_size": BATCH, "manual_seed": 3, "lr": 0.0002, "nc": 3, "image_size": 16, "niter": EPOCHS}
    assert expected.items() <= settings.items()
    assert settings["versions"]["torch"] == torch.__version__


def test_log_has_a_row_per_logged_step(unbroken):
    rows = log_rows(unbroken)
    columns = ["epoch", "step", "images", "loss_D", "loss_G", "D_x", "D_G_z1", "D_G_z2", "images_per_s"]
    assert list(rows[0]) == columns
    where = [(epoch, step) for epoch in range(EPOCHS) for step in (20, 40, 60, 63)]
    expected = [(e, 63 * e + s, PICTURES * e + min(PICTURES, BATCH * s)) for e, s in where]
    assert [(row["epoch"], row["step"], row["images"]) for row in rows] == expected
    for row in rows:
        assert all(0 < row[name] < 1 for name in ("D_x", "D_G_z1", "D_G_z2"))
        assert min(row["loss_D"], row["loss_G"], row["images_per_s"]) > 0


def test_weights_files_are_plain(unbroken):
    networks = {"netG": Generator(10, 8, 3, 16), "netG_ema": Generator(10, 8, 3, 16), "netD": Discriminator(8, 3, 16)}
    for role, net in networks.items():
        state = torch.load(unbroken / f"{role}_epoch_{EPOCHS - 1}.pth", weights_only=True)
        assert type(state) is dict
        assert list(state) == list(net.state_dict())
        for name, t in state.items():
            assert t.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
            assert t.is_contiguous()
            assert t.device.type == "cpu"
            assert torch.equal(t, checkpoint(unbroken)[role][name])
        net.load_state_dict(state)


def test_pictures_of_a_run(unbroken):
    side = 8 * (16 + 2) + 2  # 8 x 8 pictures with a border of two pixels
    grids = [Image.open(unbroken / f"fake_samples_epoch_{epoch:03d}.png") for epoch in range(EPOCHS)]
    grids.append(Image.open(unbroken / "real_samples.png"))
    assert [(grid.size, grid.mode) for grid in grids] == [((side, side), "RGB")] * (EPOCHS + 1)
    assert len({grid.tobytes() for grid in grids}) == EPOCHS + 1
    assert Image.open(unbroken / "progress.gif").n_frames == EPOCHS
    Image.open(unbroken / "losses.png").load()


# Exact continuation


def test_killed_run_continues_exactly(base, unbroken):
    killed = start(base / "killed", "dcgan.py", *RUN)
    folder = base / "killed" / "out"
    wait_for((folder / "checkpoint.prev.pth").exists, killed)  # the first epoch's follows the one at the start
    killed.kill()
    finish(killed, -signal.SIGKILL)
    position = checkpoint(folder)["epoch"]
    assert 0 < position < EPOCHS
    (folder / ".netG_epoch_1.pth.1234.part").write_bytes(b"as a kill in the middle of a save leaves it")
    with open(folder / "log.csv", "a") as log:  # rows of steps that will be taken again, the last cut off
        log.write(f"{position},{63 * position + 20},1,9,9,9,9,9,9\n{position},{63 * position + 40},1,9")
    finish(start(base / "killed", "dcgan.py", "--resume"))  # every option that is left out comes from the checkpoint
    assert_same_run(folder, unbroken)
    assert without_speed(log_rows(folder)) == without_speed(log_rows(unbroken))
    assert [p.name for p in files(folder)] == [p.name for p in files(unbroken)]
    pictures = [p for p in files(unbroken) if p.suffix == ".png" and p.name != "losses.png"]
    assert all((folder / p.name).read_bytes() == p.read_bytes() for p in pictures)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_stopped_run_saves_and_continues_exactly(base, unbroken, name, code):
    stopped = start(base / name, "dcgan.py", *RUN)
    folder = base / name / "out"
    log = folder / "log.csv"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, stopped)  # in the first epoch
    stopped.send_signal(getattr(signal, name))
    errors = finish(stopped, code)
    assert errors.startswith(f"{name}: saved in out; with --resume it goes on at epoch ")
    assert errors.count("\n") == 1
    state = checkpoint(folder)
    assert state["step"] > 0  # in the middle of an epoch
    assert state["steps"] == 63 * state["epoch"] + state["step"]
    assert here(folder, "--resume") == 0
    assert_same_run(folder, unbroken)


def test_run_killed_before_its_first_save_keeps_its_options_and_seed(base, unbroken, monkeypatch):
    folder = base / "early"
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "train", lambda *_: 0)  # killed there
        assert here(folder, *RUN) == 0
    assert here(folder, "--resume") == 0
    assert_same_run(folder, unbroken)


def test_signal_in_the_last_step_of_an_epoch_finds_the_epoch_saved(base, unbroken, monkeypatch):
    folder, step = base / "last-step", dcgan.Trainer.step

    def step_and_signal(training, *batch):
        measures = step(training, *batch)
        if training.steps == 63:
            os.kill(os.getpid(), signal.SIGTERM)
        return measures

    with monkeypatch.context() as patch:
        patch.setattr(dcgan.Training, "step", step_and_signal)
        assert here(folder, *RUN) == 143
    assert [checkpoint(folder)[name] for name in ("epoch", "step")] == [1, 0]
    assert (folder / "netG_epoch_0.pth").is_file()
    assert here(folder, "--resume") == 0
    assert_same_run(folder, unbroken)
    assert without_speed(log_rows(folder)) == without_speed(log_rows(unbroken))


def test_a_signal_while_the_processes_agree_is_not_lost(base, unbroken, monkeypatch):
    """It comes inside the very call that asks whether one has come."""
    first = iter([True])

    def interrupted(number):
        if next(first, False):
            signal.raise_signal(signal.SIGTERM)
        return number

    monkeypatch.setattr(dcgan, "largest", interrupted)
    assert here(base / "agree", *RUN, "--niter", "1") == 143
    assert checkpoint(base / "agree")["steps"] == 2


def test_signals_that_the_caller_ignores_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with dcgan.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
    finally:
        signal.signal(signal.SIGHUP, before)


def test_run_that_waited_does_not_overwrite_the_one_that_came_before(tmp_path, unbroken):
    folder = shutil.copytree(unbroken, tmp_path / "out")
    before = hashes(folder)
    with pytest.raises(UserError, match="holds a run"):
        RunFolder(folder).open()  # its own look at the folder was before that run
    stale = RunFolder(folder)
    with pytest.raises(UserError, match="start again"):
        stale.open(checkpoint(folder) | {"steps": 1})
    assert hashes(folder) == before


def test_log_keeps_every_digit_when_a_run_goes_on(tmp_path):
    row = dict.fromkeys(LOG_FIELDS, 0.25) | {"epoch": 24, "step": 1_234_567, "images": 5_064_975}
    run = RunFolder(tmp_path)
    run.open()
    run.add_row(row)
    run.save_checkpoint({"steps": 1_234_567, "options": {}})
    text = (tmp_path / "log.csv").read_text()
    assert "24,1234567,5064975,0.25," in text
    run.lock.close()
    again = RunFolder(tmp_path)
    again.open({"steps": 1_234_567})
    assert (tmp_path / "log.csv").read_text() == text
    assert again.rows == [row]


def test_longer_run_equals_an_unbroken_one(base, unbroken):
    folder = base / "longer"
    for epochs in (1, EPOCHS):
        assert here(folder, *RUN, "--niter", epochs, "--resume") == 0  # with nothing to continue, it begins
    assert_same_run(folder, unbroken)
    assert json.loads((folder / "args.json").read_text())["niter"] == EPOCHS
    before = hashes(folder)
    assert here(folder, "--resume") == 0  # nothing is left to do
    changed = {name for name, value in hashes(folder).items() if before[name] != value}
    assert changed <= {"args.json", "progress.gif"}


def test_without_a_compiler_a_run_warns_once_and_goes_on(base, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(base / "compiled"))
    warnings = finish(start(base / "cxx", "dcgan.py", *RUN, "--dry-run", "--compile")).splitlines()
    assert [line for line in warnings if "compile" in line][0].startswith("warning: --compile: not possible here")
    assert checkpoint(base / "cxx" / "out")["steps"] == 1


def test_precision_may_change_when_a_run_goes_on(base, unbroken, capsys):
    shutil.copytree(unbroken, base / "bf16")
    assert here(base / "bf16", "--resume", "--niter", "4", "--precision", "bf16") == 0
    assert "precision    bf16" in capsys.readouterr().out
    assert here(base / "bf16", "--resume", "--niter", "5") == 0
    assert "precision    bf16" in capsys.readouterr().out


def test_no_cache_gives_the_same_weights(base, unbroken):
    assert here(base / "uncached", *RUN, "--cache", "none", "--niter", 1) == 0
    for role in ("netG", "netD", "netG_ema"):
        weights = [torch.load(f / f"{role}_epoch_0.pth", weights_only=True) for f in (base / "uncached", unbroken)]
        assert_same(*weights)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "--lr", 0.1], "lr 0.0002, not 0.1"),
        (["--resume", "--ngf", 16, "--nz", 7], "nz 10, not 7; ngf 8, not 16"),
        (["--resume", "--dataset", "cartoon"], "dataset fake, not cartoon"),
        (["--resume", "--manualSeed", 4], "manual_seed 3, not 4"),
        (RUN, "--resume"),
    ],
)
def test_old_runs_are_neither_changed_nor_overwritten(unbroken, capsys, arguments, words):
    before = hashes(unbroken)
    assert_refused(lambda: here(unbroken, *arguments), capsys, words)
    assert hashes(unbroken) == before


def test_two_runs_cannot_share_a_folder(tmp_path, capsys):
    first = RunFolder(tmp_path / "out")
    first.open()
    before = hashes(tmp_path)
    assert_refused(lambda: here(tmp_path / "out", *RUN), capsys, "another run is writing there")
    assert {n: h for n, h in hashes(tmp_path).items() if not n.startswith("cache")} == before


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(base, unbroken, capsys):
    folder = shutil.copytree(unbroken, base / "damaged")
    newest = folder / "checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:-2000])
    assert here(folder, "--resume") == 0
    assert "checkpoint.pth" in capsys.readouterr().err  # said, not hidden
    assert_same_run(folder, unbroken)


def test_diverged_run_saves_nothing(tmp_path, capsys):
    assert here(tmp_path / "out", *RUN, "--lr", 1e30) == 1
    assert capsys.readouterr().err.startswith("dcgan.py: ")
    assert [path.name for path in tmp_path.rglob("*.pth")] == ["checkpoint.pth"]
    assert checkpoint(tmp_path / "out")["steps"] == 0  # that of the start


# Dry runs, weights to start from


def test_dry_run_writes_everything_and_leaves_the_folder_free(tmp_path):
    folder = tmp_path / "out"
    assert here(folder, *RUN, "--dry-run") == 0
    assert {"netG_epoch_0.pth", "netG_ema_epoch_0.pth", "netD_epoch_0.pth"} < {p.name for p in files(folder)}
    assert checkpoint(folder)["steps"] == 1
    assert here(folder, *RUN, "--niter", 1, "--lr", 0.001) == 0  # another run
    assert checkpoint(folder)["steps"] == 63


def test_run_after_a_dry_run_can_be_continued_from_its_start(tmp_path, monkeypatch):
    folder, other = tmp_path / "out", [*RUN, "--lr", 0.001]
    assert here(folder, *RUN, "--dry-run") == 0
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "train", lambda *_: 0)  # killed before its first save
        assert here(folder, *other) == 0
    assert here(folder, *other, "--niter", 1, "--resume") == 0
    assert checkpoint(folder)["steps"] == 63


def test_dry_continuation_does_not_free_a_real_run(base, unbroken, capsys):
    folder = shutil.copytree(unbroken, base / "real")
    with contextlib.suppress(SystemExit):  # refusing it would do as well
        here(folder, "--resume", "--niter", EPOCHS + 1, "--dry-run")
    capsys.readouterr()
    assert_refused(lambda: here(folder, *RUN, "--manualSeed", 9), capsys, "--resume")


def test_given_weights_are_where_the_run_starts(tmp_path, unbroken, capsys):
    for given in ("netG", "netD"):
        folder = tmp_path / given
        weights = unbroken / f"{given}_epoch_1.pth"
        assert here(folder, *RUN, f"--{given}", weights, "--lr", 0, "--dry-run") == 0
        assert "warning: without --net" in capsys.readouterr().err  # the other starts afresh
        saved, start_weights = (torch.load(p, weights_only=True) for p in (folder / f"{given}_epoch_0.pth", weights))
        learned = [name for name in saved if name.endswith(("weight", "bias"))]
        assert all(torch.equal(saved[name], start_weights[name]) for name in learned)  # lr 0 keeps them


def test_mirrors_are_those_of_the_seed_and_continue(tmp_path, unbroken):
    one, two = tmp_path / "one", tmp_path / "two"
    assert here(one, *RUN, "--flip") == 0
    assert here(two, *RUN, "--flip", "--niter", 1) == 0
    assert here(two, "--resume", "--niter", EPOCHS) == 0
    assert_same_run(two, one)
    ours, plain = (checkpoint(folder)["netD"]["main.0.weight"] for folder in (one, unbroken))
    assert not torch.equal(ours, plain)


# The public example's command line, and the pictures in the end


def test_public_examples_command_line(base):
    (base / "photos" / "a class").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(70):
        pixels = noise.integers(0, 256, (80, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "photos" / "a class" / f"{i}.png")
    command = "--dataset folder --dataroot ../photos --batchSize 64 --imageSize 64 --niter 1 --outf o --manualSeed 1"
    command += " --workers 2 --nz 100 --ngf 8 --ndf 8 --lr 0.0002 --beta1 0.5 --ngpu 1 --classes bedroom --accel"
    finish(start(base / "public", "dcgan.py", *command.split()))
    public_generator(100, 8, 3).load_state_dict(torch.load(base / "public" / "o" / "netG_epoch_0.pth"), strict=True)
    public_discriminator(8, 3).load_state_dict(torch.load(base / "public" / "o" / "netD_epoch_0.pth"), strict=True)


def test_generated_pictures_depend_on_weights_and_seed_alone(base, unbroken, tmp_path):
    command = ["--load_path", unbroken, "--num_output", 70, "--batchSize", 16]
    finish(start(base / "sampled", "generate.py", *command))
    folder = base / "sampled" / "generated"
    assert [p.name for p in files(folder)] == ["grid.png", *(f"seed{k:06d}.png" for k in range(70))]
    assert Image.open(folder / "grid.png").size == (146, 146)  # the first 64
    for i, (count, batch, seed) in enumerate([(1, 256, 0), (1, 256, 69), (70, 1, 0), (7, 3, 33), (66, 65, 2)]):
        options = ["--load_path", unbroken, "--outf", tmp_path / str(i), "--num_output", count, "--batchSize", batch]
        generate.main([str(option) for option in (*options, "--manualSeed", seed)])
        assert [p.name for p in files(tmp_path / str(i))[1:]] == [f"seed{seed + k:06d}.png" for k in range(count)]
        for picture in files(tmp_path / str(i))[1:]:
            assert picture.read_bytes() == (folder / picture.name).read_bytes()
    # Picture 5 by another way: the averaged generator, a latent of its own, one at a time.
    netG, z = load_generator(unbroken / f"netG_ema_epoch_{EPOCHS - 1}.pth"), torch.Generator().manual_seed(5)
    with torch.no_grad():
        x = netG(torch.randn(10, generator=z)[None])[0].permute(1, 2, 0)
    shown = np.asarray(Image.open(folder / "seed000005.png")).astype(int)
    assert np.abs(shown - ((x.numpy() + 1) * 127.5)).max() < 0.51


# Requests that cannot work


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


@pytest.fixture(scope="module")
def material(base):
    """Weights and folders that requests can name, good and bad."""
    folder = base / "material"
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


needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")


NUMBERS = {  # values out of range
    (dcgan, "--imageSize"): "0 x 1.5",
    (dcgan, "--batchSize"): "0 -1",
    (dcgan, "--workers"): "-1",
    (dcgan, "--niter"): "0 -1",
    (dcgan, "--lr"): "inf nan -1",
    (dcgan, "--beta1"): "1 -0.1 nan",
    (dcgan, "--ema"): "1 nan",
    (dcgan, "--nz"): "0",
    (dcgan, "--ngf"): "0",
    (dcgan, "--ndf"): "0",
    (dcgan, "--nc"): "2",
    (dcgan, "--log-every"): "0",
    (dcgan, "--save-every"): "0",
    (dcgan, "--manualSeed"): "-1 99999999999999999999",
    (generate, "--num_output"): "0 -1",
    (generate, "--batchSize"): "0",
    (generate, "--manualSeed"): "-1 99999999999999999999",
}
REFUSED = [(program, f"{option} {v}", option) for (program, option), vs in NUMBERS.items() for v in vs.split()]
REFUSED += [
    (dcgan, "--imageSize 65", "64 and 80"),
    (dcgan, "--nonsense", "--nonsense"),
    (dcgan, "--dataset nonsense", "cartoon"),
    (dcgan, "--dataset lsun --classes tower --dataroot {m}/lsun", "church"),
    (dcgan, "--dataset folder", "--dataroot"),
    (dcgan, "--dataset folder --dataroot {m}/nowhere", "{m}/nowhere"),
    (dcgan, "--dataset folder --dataroot {m}/empty", "no pictures"),
    (dcgan, "--outf {m}/G.pth", "--outf"),
    (dcgan, "--outf {m}/G.pth/below", "--outf"),
    (dcgan, "--outf {m}/foreign --resume", "checkpoint.pth"),
    (dcgan, "--ngpu 1000", "--ngpu"),
    (dcgan, f"{SMALL} --ngf 16 --netG {{m}}/G.pth", "netG has ngf 8, this run wants 16"),
    (dcgan, f"{SMALL} --imageSize 32 --netD {{m}}/D.pth", "netD has image_size 16, this run wants 32"),
    (dcgan, f"{SMALL} --netG {{m}}/D.pth", "it holds a discriminator"),
    (dcgan, f"{SMALL} --netD {{m}}/G.pth", "it holds a generator"),
    (dcgan, f"{SMALL} --netG {{m}}/nan.pth", "not finite"),
    (dcgan, f"{SMALL} --netG {{m}}/page.pth", "page.pth"),
    (dcgan, f"{SMALL} --netG {{m}}/nowhere.pth", "no such file"),
    (generate, "--outf {m}/D.pth", "--outf"),
    (generate, "--load_path {m}/D.pth", "it holds a discriminator"),
    (generate, "--load_path {m}/nan.pth", "not finite"),
    (generate, "--load_path {m}/page.pth", "page.pth"),
    (generate, "--load_path {m}/nowhere", "no such file"),
    (generate, "--load_path {m}/empty", "no weights"),
    (generate, "--nonsense", "--nonsense"),
]
REFUSED += [] if torch.cuda.is_available() else [(program, "--cuda", "--cuda") for program in (dcgan, generate)]


@pytest.mark.parametrize(("program", "command", "words"), REFUSED)
def test_requests_that_cannot_work_are_refused(tmp_path, monkeypatch, capsys, material, program, command, words):
    monkeypatch.chdir(tmp_path)
    before = hashes(material)
    arguments = ["--cache", "cache"] if program is dcgan else ["--load_path", str(material / "G.pth")]
    arguments += command.format(m=material).split()
    assert_refused(lambda: program.main(arguments), capsys, words.format(m=material))
    assert list(tmp_path.iterdir()) == []
    assert hashes(material) == before


@pytest.mark.parametrize("size", [16, 28, 32, 64, 96, 128, 256])
def test_every_size_trains_and_samples(size, base, tmp_path):
    write(tmp_path / "in", *(f"{i}.png" for i in range(3)))
    options = (
        f"--dataset folder --dataroot {tmp_path}/in --imageSize {size} --nz 4 --ngf 4 --ndf 4 --workers 0 --dry-run"
    )
    assert here(tmp_path / "out", *options.split()) == 0
    generate.main(["--load_path", f"{tmp_path}/out", "--num_output", "2", "--outf", f"{tmp_path}/made"])
    assert {Image.open(path).size for path in (tmp_path / "made").glob("seed*.png")} == {(size, size)}


def test_both_run_where_the_output_is_no_file(tmp_path):  # as in a notebook
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert here(tmp_path / "run", *RUN[:-2], "--niter", "1") == 0
        generate.main(["--load_path", str(tmp_path / "run"), "--num_output", "2", "--outf", str(tmp_path / "made")])
    assert "epoch 1/1" in said.getvalue()
    assert len(files(tmp_path / "made")) >= 2

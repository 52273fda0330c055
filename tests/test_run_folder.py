"""support/run_folder.py: who may write into a run folder, damaged checkpoints, and the thread that writes."""

import errno
import json
import shutil
import threading
import zipfile

import pytest
import torch
from helpers import (
    EPOCHS,
    RUN,
    assert_refused,
    assert_same,
    assert_same_run,
    checkpoint,
    files,
    hashes,
    run_dcgan,
)

import dcgan
import support.run_folder
from support.errors import UserError
from support.run_folder import RunFolder
from support.weights import read_file

STATE = {"steps": 0, "options": {}}


def open_folder(path, resumed=None):
    folder = RunFolder(path)
    folder.open(resumed)
    return folder


# Who may write


def test_two_runs_cannot_share_a_folder(tmp_path, few_steps, capsys):
    first = open_folder(tmp_path / "out")
    before = hashes(tmp_path)
    assert_refused(lambda: run_dcgan(tmp_path / "out", *few_steps), capsys, "another run is writing there")
    assert {n: h for n, h in hashes(tmp_path).items() if not n.startswith("cache")} == before
    del first  # its lock ends with it
    assert run_dcgan(tmp_path / "out", *few_steps) == 0


def test_a_closed_folder_is_free_for_the_next_run(tmp_path):
    """In the same process as well, where the first RunFolder may still be referred to."""
    folder = RunFolder(tmp_path / "out")
    folder.open()
    with pytest.raises(UserError, match="another run is writing there"):
        RunFolder(tmp_path / "out").open()
    folder.close()
    RunFolder(tmp_path / "out").open()


def test_a_run_that_waited_does_not_overwrite_the_one_before_it(tmp_path, unbroken):
    folder = shutil.copytree(unbroken, tmp_path / "out")
    before = hashes(folder)
    with pytest.raises(UserError, match="holds a run: add --resume"):
        open_folder(folder)  # its own look at the folder was before that run
    with pytest.raises(UserError, match="start again"):
        open_folder(folder, checkpoint(folder) | {"steps": 1})
    assert hashes(folder) == before


def test_weights_without_a_checkpoint_are_not_overwritten(tmp_path, few_steps, capsys):
    for name in ("netG_best.pth", "netG_epoch_3.pth", "netD_epoch_12.pth"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"best")
        with pytest.raises(UserError, match="holds weights, but no checkpoint to resume"):
            RunFolder(folder).check_can_start(resume=True)
        assert_refused(
            lambda folder=folder: run_dcgan(folder, *few_steps, "--dry-run"), capsys, "holds weights, but no checkpoint"
        )
        assert [(path.name, path.read_bytes()) for path in files(folder)] == [(name, b"best")]


def test_a_new_run_leaves_other_files_in_its_folder_alone(tmp_path, few_steps):
    others = {name: name.encode() for name in ("netG.pth", "network.pth", "netG_mine.pth", "skipped.txt", "a.png")}
    (tmp_path / "out").mkdir()
    for name, content in others.items():
        (tmp_path / "out" / name).write_bytes(content)
    assert run_dcgan(tmp_path / "out", *few_steps, "--dry-run") == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in others} == others


# Dry runs


def test_only_what_a_dry_run_wrote_is_removed(tmp_path):
    ours = ["checkpoint.pth", "checkpoint.prev.pth", "skipped.txt", "netG_best.pth", "netG_epoch_0.pth"]
    ours += ["netD_epoch_0.pth", "netG_ema_epoch_0.pth", "fake_samples_epoch_000.png", "report.html"]
    for name in [*ours, "netG_mine.pth", "photo.png", ".a.png.77.part"]:
        (tmp_path / name).write_bytes(b"")
    folder = RunFolder(tmp_path)
    for text in ("{}", "", "[1]", '{"dry_run": false}', '{"dry_run": tr'):  # not a dry run, or not to be read
        (tmp_path / "args.json").write_text(text)
        assert not folder.is_dry_run()
        with pytest.raises(UserError, match="holds a run"):
            folder.check_can_start(resume=False)
    folder.save_settings({"dry_run": True})
    assert json.loads((tmp_path / "args.json").read_text()) == {"dry_run": True}
    folder.check_can_start(resume=False)
    folder.open()
    assert {path.name for path in files(tmp_path)} - {".lock"} == {"args.json", "netG_mine.pth", "photo.png"}


def test_a_dry_run_writes_everything_and_leaves_the_folder_free(tmp_path, few_steps, monkeypatch):
    folder = tmp_path / "out"
    assert run_dcgan(folder, *few_steps, "--dry-run") == 0
    names = {path.name for path in files(folder)}
    assert {"netG_epoch_0.pth", "netG_ema_epoch_0.pth", "netD_epoch_0.pth", "fake_samples_epoch_000.png"} < names
    assert {"real_samples.png", "losses.png", "progress.gif", "log.csv", "checkpoint.prev.pth"} < names
    assert checkpoint(folder)["steps"] == 1
    other = [*few_steps, "--lr", 0.001]  # another run
    with monkeypatch.context() as patch:
        patch.setattr("dcgan.train", lambda *_: 0)  # killed before its first save
        assert run_dcgan(folder, *other) == 0
    assert checkpoint(folder)["steps"] == 0
    assert not (folder / "netG_epoch_0.pth").exists()
    assert run_dcgan(folder, *other, "--resume") == 0
    assert checkpoint(folder)["steps"] == 6


def test_a_dry_run_cannot_resume_a_real_one(tmp_path, unbroken, capsys):
    folder = shutil.copytree(unbroken, tmp_path / "out")
    before = hashes(folder)
    command = ["--resume", "--niter", EPOCHS + 1, "--dry-run"]
    assert_refused(lambda: run_dcgan(folder, *command), capsys, "--dry-run would add a step to the run")
    assert_refused(lambda: run_dcgan(folder, *RUN, "--manualSeed", 9), capsys, "--resume")
    assert hashes(folder) == before


# Damaged checkpoints, and what a kill leaves


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-2000])


def flip_a_bit(path):
    """Change a bit in the middle of the largest tensor."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        tensor = max(archive.infolist(), key=lambda part: part.file_size)
    content[tensor.header_offset + tensor.file_size // 2] ^= 1
    path.write_bytes(content)


DAMAGE = [(cut_off, "cannot be read as weights"), (flip_a_bit, "checksum mismatch")]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, unbroken, capsys, damage, words):
    path = shutil.copytree(unbroken, tmp_path / "out")
    damage(path / "checkpoint.pth")
    folder, previous = RunFolder(path), read_file(path / "checkpoint.prev.pth")
    state = folder.load_checkpoint()
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {path / 'checkpoint.pth'}")
    assert warning.endswith(f"; using the one before it, {path / 'checkpoint.prev.pth'}\n")
    assert words in warning
    assert warning.count("\n") == 1
    assert_same(state["optimizerG"], previous["optimizerG"])
    assert state["epoch"] == previous["epoch"] == EPOCHS - 1
    assert folder.load_checkpoint(warn=False)["epoch"] == EPOCHS - 1
    assert capsys.readouterr().err == ""
    folder.save_checkpoint(STATE | {"steps": 7})  # the damaged one does not replace the intact one
    assert read_file(path / "checkpoint.prev.pth")["epoch"] == EPOCHS - 1
    folder.save_checkpoint(STATE | {"steps": 8})
    assert [read_file(path / f"checkpoint{which}.pth")["steps"] for which in (".prev", "")] == [7, 8]
    for name in ("checkpoint.pth", "checkpoint.prev.pth"):
        (path / name).write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(UserError, match=r"checkpoint.prev.pth cannot be read"):
        folder.load_checkpoint()


def test_a_run_with_a_damaged_checkpoint_and_half_written_files_ends_as_if_nothing_had_happened(
    tmp_path, unbroken, capsys
):
    folder = shutil.copytree(unbroken, tmp_path / "out")
    flip_a_bit(folder / "checkpoint.pth")
    for name in (".checkpoint.pth.4242.part", ".losses.png.7.part"):  # of a killed run
        (folder / name).write_bytes(b"half")
    assert run_dcgan(folder, "--resume") == 0
    assert "checksum mismatch" in capsys.readouterr().err
    assert_same_run(folder, unbroken)
    assert [path.name for path in files(folder)] == [path.name for path in files(unbroken)]


def test_a_file_of_another_program_is_no_checkpoint(tmp_path, unbroken):
    torch.save({"model": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="is not a checkpoint of this program"):
        RunFolder(tmp_path).load_checkpoint()
    assert RunFolder(tmp_path / "nowhere").load_checkpoint() is None


def test_skipped_images_are_listed_once_by_their_names_on_the_disk(tmp_path):
    folder = open_folder(tmp_path)
    folder.add_skipped(["ü.png (cut off)", "c\udcff.gif (cut off)"])
    folder.add_skipped(["b.png (cut off)", "ü.png (cut off)", "b.png (cut off)"])
    lines = ["ü.png (cut off)".encode(), b"c\xff.gif (cut off)", b"b.png (cut off)"]
    assert folder.skipped.read_bytes() == b"\n".join([*lines, b""])


# The thread that writes


def test_the_thread_takes_one_task_at_a_time_and_wait_returns_when_it_is_done(tmp_path):
    folder, go, done = RunFolder(tmp_path), threading.Event(), []
    folder.wait()  # nothing was ever asked
    folder.in_background(lambda: done.append((go.wait(60), threading.current_thread() is threading.main_thread())))
    assert done == []  # it was not waited for
    go.set()
    folder.in_background(done.append, "second")
    assert done[0] == (True, False)  # the first is done before the second begins
    folder.wait()
    assert done[1:] == ["second"]


def test_what_the_thread_raises_reaches_the_next_call_once(tmp_path):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    folder, done = RunFolder(tmp_path), []
    folder.in_background(fail)
    with pytest.raises(OSError, match="No space left"):
        folder.in_background(done.append, "not begun")
    assert done == []
    folder.wait()  # it was told
    folder.in_background(fail)
    with pytest.raises(OSError, match="No space left"):
        folder.wait()
    folder.in_background(done.append, "begun")
    folder.wait()
    assert done == ["begun"]


@pytest.mark.parametrize("failing", [2, 3, 4])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, few_steps, monkeypatch, capsys, failing):
    """In one line, when the second or the third epoch is saved, or at the end: the thread wrote the one before."""
    folder, save, calls = tmp_path / "out", RunFolder.save_checkpoint, []

    def save_checkpoint(self, state):
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == failing:
            with monkeypatch.context() as patch:
                patch.setattr("os.replace", no_space)
                save(self, state)
        save(self, state)

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "save_checkpoint", save_checkpoint)
    assert run_dcgan(folder, *few_steps, "--niter", 3) == 1
    reason = "could not be written (No space left on device); files saved before it are intact\n"
    assert capsys.readouterr().err == f"dcgan.py: {folder / 'checkpoint.pth'} {reason}"
    assert calls == [True] + [False] * (failing - 1)  # the first one, at the start, before it trains
    assert checkpoint(folder)["epoch"] == failing - 2
    assert list(folder.glob(".*.part")) == []


# --keep


def weights_in(folder):
    return sorted((path.name for path in folder.glob("net*")), key=lambda name: name.split("_")[::-1])


def names_of(*epochs):
    return [f"{name}_epoch_{epoch}.pth" for epoch in epochs for name in ("netD", "netG_ema", "netG")]


def test_the_weights_of_the_newest_saves_stay(tmp_path, few_steps):
    assert run_dcgan(tmp_path / "all", *few_steps, "--niter", 4) == 0
    assert run_dcgan(tmp_path / "out", *few_steps, "--niter", 4, "--keep", 2) == 0
    gone = {path.name for path in files(tmp_path / "all")} - {path.name for path in files(tmp_path / "out")}
    assert gone == set(names_of(0, 1))
    assert_same_run(tmp_path / "out", tmp_path / "all")


def test_only_what_this_run_has_saved_is_removed_also_when_it_resumes(tmp_path, few_steps):
    """With other numbers to keep, and after a kill that left weights which were to be removed."""
    folder, others = (
        tmp_path / "out",
        ["netG_epoch_0.pth", "netD_epoch_2.pth", "netG_ema_epoch_99.pth", "netG_best.pth"],
    )
    assert run_dcgan(folder, *few_steps, "--niter", 2, "--save-every", 2) == 0
    for name in others:
        (folder / name).write_bytes(b"of another run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "remove_old_weights", lambda *_: None)  # killed before it, every time
        assert run_dcgan(folder, "--resume", "--niter", 4, "--keep", 1) == 0
    assert weights_in(folder) == sorted([*names_of(1, 3), *others], key=lambda name: name.split("_")[::-1])
    assert run_dcgan(folder, "--resume", "--niter", 6) == 0
    assert set(weights_in(folder)) == {*names_of(5), *others}
    assert run_dcgan(folder, "--resume", "--niter", 8, "--keep", 0) == 0
    assert run_dcgan(folder, "--resume", "--niter", 10) == 0
    assert set(weights_in(folder)) == {*names_of(5, 7, 9), *others}
    assert all((folder / name).read_bytes() == b"of another run" for name in others)


def test_weights_that_an_earlier_version_saved_stay(tmp_path, few_steps):
    folder = tmp_path / "out"
    assert run_dcgan(folder, *few_steps, "--niter", 2) == 0
    state = checkpoint(folder)
    del state["saved_epochs"], state["options"]["keep"]
    torch.save(state, folder / "checkpoint.pth")
    assert run_dcgan(folder, "--resume", "--niter", 4, "--keep", 1) == 0
    assert set(weights_in(folder)) == set(names_of(0, 1, 3))


def test_weights_that_cannot_be_removed_are_removed_later(tmp_path, monkeypatch):
    folder, state = RunFolder(tmp_path, keep=1), STATE | {"step": 0}

    def is_open(*_, **__):
        raise PermissionError(errno.EACCES, "it is open in another program")

    monkeypatch.setattr(support.run_folder, "plot_losses", lambda *_: None)
    for epoch in (1, 2, 3):
        with monkeypatch.context() as patch:
            if epoch == 2:
                patch.setattr(type(tmp_path), "unlink", is_open)
            folder.save(
                state | {"epoch": epoch},
                {"netG": {}, "netD": {}},
                [torch.zeros(3, 4, 4, dtype=torch.uint8)],
                [],
                1,
                last=False,
            )
        left = [int(path.stem.split("_")[-1]) for path in sorted(tmp_path.glob("netG_epoch_*"))]
        assert left == ([0], [0, 1], [2])[epoch - 1]
    assert read_file(tmp_path / "checkpoint.pth")["saved_epochs"] == [0, 1, 2]


# Decoration


def test_losses_are_plotted_at_the_end_and_at_most_every_30_seconds_before_it(tmp_path, monkeypatch):
    folder, plotted, now = RunFolder(tmp_path), [], 1e6
    monkeypatch.setattr(support.run_folder, "plot_losses", lambda path, rows, steps: plotted.append(rows))
    monkeypatch.setattr(support.run_folder.time, "monotonic", lambda: now)
    for seconds, last in ((0, False), (29, False), (31, False), (32, True)):
        now = 1e6 + seconds
        folder.save(STATE | {"epoch": 1, "step": 5}, None, None, [seconds], 63, last)
    assert plotted == [[0], [31], [32]]


def test_decoration_that_fails_is_warned_of_once(tmp_path, capsys):
    folder, drawn = RunFolder(tmp_path), []

    def no_font(path):
        raise RuntimeError("no\nfont")

    def no_space(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for draw in (no_font, drawn.append, no_font, no_space, no_font):
        folder.draw_or_warn(draw, f"{draw.__name__}.png")
    folder.draw_or_warn(lambda path, *numbers: drawn.append(numbers), "b.png", 1, 2)
    lines = ["warning: no_font.png is not drawn (no font); training continues"]
    lines += ["warning: no_space.png is not drawn ([Errno 28] No space left on device); training continues"]
    assert capsys.readouterr().err.splitlines() == lines
    assert drawn == [tmp_path / "append.png", (1, 2)]


def test_a_run_without_its_plots_ends_well_with_complete_checkpoints(tmp_path, few_steps, monkeypatch, capsys):
    """Each of plot_losses, animate, save_grid and write_report is warned of once, in three epochs."""
    run_dcgan(tmp_path / "usual", *few_steps, "--niter", 3)
    capsys.readouterr()

    def cannot_draw(name):
        def draw(*_):
            raise RuntimeError("no font")

        for module in (dcgan, support.run_folder):
            monkeypatch.setattr(module, name, draw, raising=False)

    for name in ("plot_losses", "animate", "save_grid", "write_report"):
        cannot_draw(name)
    assert run_dcgan(tmp_path / "out", *few_steps, "--niter", 3) == 0
    warned = ["real_samples.png", "report.html", "losses.png", "progress.gif"]
    warnings = [f"warning: {name} is not drawn (no font); training continues" for name in warned]
    output, errors = capsys.readouterr()
    assert errors.splitlines() == warnings
    assert "report: " not in output
    assert_same_run(tmp_path / "out", tmp_path / "usual")
    drawn = {*warned, *(f"fake_samples_epoch_00{i}.png" for i in range(3))}
    names = [{path.name for path in files(tmp_path / folder)} for folder in ("usual", "out")]
    assert names[0] - names[1] == drawn
    assert names[1] < names[0]

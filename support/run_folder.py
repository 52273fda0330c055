"""The folder of one run: who may write into it, and its files, each complete or absent."""

import contextlib
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from support.errors import UserError, error_text
from support.files import check_writable, make_folder, try_lock, write_atomically
from support.plots import grid_name, plot_losses, save_grid
from support.report import write_report
from support.weights import read_file

PLOT_SECONDS = 30  # between two plots, at least: each holds the GIL, and so stops training, for half a second


class RunFolder:
    """The folder of one run (`--outf`). Nothing is written before `open`.

    Files that take long are written by a thread, one task at a time, so that training need not wait for the disk.
    """

    def __init__(self, path, keep=0):
        """keep: how many of the newest checkpoints keep their weights files (0: all)."""
        self.path, self.keep, self.lock = Path(path), keep, None
        self.saved_epochs = []  # those whose weights files this run has written and not removed
        self.newest, self.previous = self.path / "checkpoint.pth", self.path / "checkpoint.prev.pth"
        self.skipped = self.path / "skipped.txt"
        self.newest_is_intact = True
        self.thread, self.task = ThreadPoolExecutor(1), None
        self.plotted, self.failed_drawings = -math.inf, set()

    def check_can_start(self, resume):
        """Raise UserError if a run could not be written here, or would overwrite another."""
        check_writable(self.path)
        is_run = self.newest.exists() or self.previous.exists()
        if self.is_dry_run() or (resume and is_run):
            return
        if is_run:
            raise UserError(f"--outf {self.path} holds a run: add --resume to continue it, or choose another --outf")
        if [*self.path.glob("net[GD]_epoch_*.pth"), *self.path.glob("netG_best.pth")]:
            raise UserError(f"--outf {self.path} holds weights, but no checkpoint to resume: choose another --outf")

    def is_dry_run(self):
        """Return whether the folder holds only what --dry-run wrote, which may be overwritten."""
        try:
            return bool(json.loads((self.path / "args.json").read_text(encoding="utf-8"))["dry_run"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def open(self, resumed=None):
        """Make the folder, take its lock, and remove what a killed run or a dry run has left.

        resumed: the checkpoint from which the run resumes. Raises UserError if another run has the lock, or has
        written here since `resumed` was read.
        """
        make_folder(self.path)
        self.lock = try_lock(self.path / ".lock")
        if self.lock is None:
            raise UserError(f"--outf {self.path}: another run is writing there; choose another --outf")
        if resumed is None:
            self.check_can_start(resume=False)
        elif (self.load_checkpoint(warn=False) or {}).get("steps") != resumed["steps"]:
            raise UserError(f"--outf {self.path}: another run has continued this one meanwhile; start again")
        else:
            saved = resumed.get("saved_epochs", ())  # old checkpoints do not list them
            self.saved_epochs = [epoch for epoch in saved if isinstance(epoch, int)]
        for partial in self.path.glob(".*.part"):
            partial.unlink()
        if not resumed and self.is_dry_run():
            old_files = [*self.path.glob("net*_epoch_*.pth"), *self.path.glob("fake_samples_epoch_*.png")]
            old_files += [self.path / name for name in ("netG_best.pth", "report.html")]
            for old in [self.newest, self.previous, self.skipped, *old_files]:
                old.unlink(missing_ok=True)

    def save_settings(self, settings):
        """Write args.json."""
        text = json.dumps(settings, indent=2) + "\n"
        write_atomically(self.path / "args.json", lambda file: file.write(text.encode()))

    def add_skipped(self, reports):
        """Add to skipped.txt a line for each image or folder that was left out, unless it is there."""
        lines = [report.encode(errors="surrogateescape") for report in reports]  # names as they are on the disk
        before = self.skipped.read_bytes().splitlines() if self.skipped.exists() else []
        text = b"\n".join([*dict.fromkeys([*before, *lines]), b""])
        write_atomically(self.skipped, lambda file: file.write(text))

    def save_weights(self, name, weights):
        write_atomically(self.path / f"{name}.pth", lambda file: torch.save(weights, file))

    def save_checkpoint(self, state):
        """Write checkpoint.pth; the one before it, if it was intact, stays as checkpoint.prev.pth."""
        keep = self.previous if self.newest_is_intact else None
        write_atomically(self.newest, lambda file: torch.save(state, file), keep=keep)
        self.newest_is_intact = True

    def save(self, state, weights, samples, rows, steps_per_epoch, last):
        """Write the checkpoint `state`, plot and page of the log's `rows`; with `weights`, also weights and grid.

        weights: {name: state dict} of the networks, or None. samples: uint8 images (N, nc, s, s), or None. last: plot
        even if that was done less than PLOT_SECONDS ago.
        """
        if weights:
            epoch = state["epoch"] - (state["step"] == 0)  # from 0: the one that has ended or, in a dry run, begun
            for name in weights:
                self.save_weights(f"{name}_epoch_{epoch}", weights[name])
            self.saved_epochs = [*(e for e in self.saved_epochs if e != epoch), epoch]
            self.draw_or_warn(save_grid, grid_name(epoch), samples)
        self.save_checkpoint(state | {"saved_epochs": list(self.saved_epochs)})
        self.remove_old_weights()
        plot = last or time.monotonic() - self.plotted > PLOT_SECONDS
        self.draw(rows, state["epoch"], state["step"], steps_per_epoch, plot)

    def draw(self, rows, epoch, step, steps_per_epoch, plot=True):
        """Write report.html of a run that goes on after `epoch` epochs and `step` steps; if `plot`, also losses.png."""
        if plot:
            self.draw_or_warn(plot_losses, "losses.png", rows, steps_per_epoch)
            self.plotted = time.monotonic()
        self.draw_or_warn(write_report, "report.html", rows, epoch, step, steps_per_epoch)

    def remove_old_weights(self):
        """Remove the weights files of all but the newest `keep` saves of this run.

        If the run is killed before this, too many remain; the checkpoint lists them, and a later save removes them.
        """
        for epoch in self.saved_epochs[: -self.keep] if self.keep else ():
            with contextlib.suppress(OSError):  # on Windows, another program may have it open
                for name in ("netG", "netD", "netG_ema"):
                    (self.path / f"{name}_epoch_{epoch}.pth").unlink(missing_ok=True)
                self.saved_epochs.remove(epoch)

    def load_checkpoint(self, warn=True):
        """Return the newest intact checkpoint, or None if there is none. Raises UserError if none can be read."""
        for path in (self.newest, self.previous):
            if path.is_file():
                try:
                    state = read_file(path)
                except UserError as error:
                    if path == self.previous or not self.previous.is_file():
                        raise
                    if warn:
                        print(f"warning: {error}; using the one before it, {self.previous}", file=sys.stderr)
                    self.newest_is_intact = False
                    continue
                if not isinstance(state, dict) or "options" not in state:
                    raise UserError(f"{path} is not a checkpoint of this program; choose another --outf")
                return state
        return None

    def draw_or_warn(self, draw, name, *arguments):
        """Call draw(path of the file `name`, *arguments); warn, once, if that fails: a plot must not end a run."""
        try:
            draw(self.path / name, *arguments)
        except Exception as error:  # of a backend, a font or the disk
            if draw not in self.failed_drawings:
                self.failed_drawings.add(draw)
                tqdm.write(f"warning: {name} is not drawn ({error_text(error)}); training continues", sys.stderr)

    def in_background(self, function, *arguments):
        """Call function(*arguments) in the thread when the task before is done. Raises what that task raised."""
        self.wait()
        self.task = self.thread.submit(function, *arguments)

    def close(self):
        """Wait for the thread, whatever becomes of its task, and end it; release the lock."""
        self.thread.shutdown()
        if self.lock:
            self.lock.release()

    def wait(self):
        """Wait until all is written. Raises what the last task raised, once."""
        task, self.task = self.task, None
        if task:
            task.result()

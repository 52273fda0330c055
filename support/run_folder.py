"""The folder of one run: weights, checkpoints, log, plots."""

import csv
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.errors import ModelError, RunError
from support.files import check_writable, write_whole
from support.plots import MOST_FRAMES
from support.weights import read_file

MEASURES = ("loss_D", "loss_G", "D_x", "D_G_z1", "D_G_z2")  # what a step reports
LOG_FIELDS = ("epoch", "step", "images", *MEASURES, "images_per_s", "fid")  # the last only where it was measured


class RunFolder:
    """The folder of one run (`--outf`). Nothing is written before `open`."""

    def __init__(self, path):
        self.path, self.rows, self.log, self.lock = Path(path), [], None, None
        self.newest, self.previous = self.path / "checkpoint.pth", self.path / "checkpoint.prev.pth"
        self.skipped, self.reported = self.path / "skipped.txt", set()
        self.newest_is_good = True
        self.samples = 0  # of each distance in its log

    def check_free(self, resume):
        """Raise RunError if a run could not be written here, or would overwrite another."""
        check_writable(self.path)
        is_run = self.newest.exists() or self.previous.exists()
        if self.is_dry_run() or (resume and is_run):
            return
        if is_run:
            raise RunError(f"--outf {self.path} holds a run: add --resume to continue it, or choose another --outf")
        if [*self.path.glob("net[GD]_epoch_*.pth"), *self.path.glob("netG_best.pth")]:
            raise RunError(f"--outf {self.path} holds weights, but no checkpoint to continue: choose another --outf")

    def is_dry_run(self):
        """Return whether the folder holds nothing but what --dry-run wrote, which may be overwritten."""
        try:
            return bool(json.loads((self.path / "args.json").read_text(encoding="utf-8"))["dry_run"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def open(self, resumed=None):
        """Make the folder, take its lock (RunError if another run has it), tidy up after a killed run, open the log.

        resumed: the checkpoint that the run goes on from. The rows of the log beyond it are dropped: those steps will
        be taken again. Without one, what a dry run left is removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._check_unchanged(resumed)
        for left_over in self.path.glob(".*.part"):
            left_over.unlink()
        if not resumed and self.is_dry_run():  # else these are somebody's own
            weights = [*self.path.glob("net*_epoch_*.pth"), self.path / "netG_best.pth"]
            for left_over in [self.newest, self.previous, self.skipped, *weights]:
                left_over.unlink(missing_ok=True)
        path = self.path / "log.csv"
        if resumed and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                whole = (row for row in csv.DictReader(file) if all(row.get(field) for field in LOG_FIELDS[:-1]))
                rows = [{k: int(v) if v.isdigit() else float(v) for k, v in row.items() if k and v} for row in whole]
            self.rows = [row for row in rows if row["step"] <= resumed["steps"]]
        self._write_log()

    def _write_log(self):
        """Write log.csv anew, and open it for rows to come."""
        lines = [",".join(LOG_FIELDS), *map(log_line, self.rows), ""]
        path = self.path / "log.csv"
        write_whole(path, lambda file: file.write("\n".join(lines).encode()))
        if self.log:
            self.log.close()
        self.log = open(path, "a", encoding="utf-8")  # noqa: SIM115 - as long as the run

    def _check_unchanged(self, resumed):
        """Raise RunError if another run has been here while this one prepared its pictures, before it had the lock."""
        if resumed is None:
            self.check_free(resume=False)
        elif (self.load_checkpoint() or {}).get("steps") != resumed["steps"]:
            raise RunError(f"--outf {self.path}: another run went on with this one meanwhile; start again")

    def _take_lock(self):
        try:
            import fcntl
        except ImportError:  # Windows has none
            return
        self.lock = open(self.path / ".lock", "w")  # noqa: SIM115 - as long as the run
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with its holder
        except OSError:
            raise RunError(f"--outf {self.path}: another run is writing there; choose another --outf") from None

    def add_row(self, row):
        """Append one row (a dict with LOG_FIELDS but "fid") to log.csv."""
        self.rows.append(row)
        print(log_line(row), file=self.log, flush=True)

    def add_distance(self, distance, weights):
        """Add the Fréchet distance to the last row. If it is the lowest so far, keep netG_best.pth; return whether."""
        lowest = distance < min((row["fid"] for row in self.rows if "fid" in row), default=math.inf)
        if lowest:
            self.save_weights("netG_best", weights)
        self.rows[-1]["fid"] = distance
        self._write_log()
        return lowest

    def save_settings(self, settings):
        text = json.dumps(settings, indent=2) + "\n"
        write_whole(self.path / "args.json", lambda file: file.write(text.encode()))

    def add_skipped(self, reports):
        """Add to skipped.txt a line for each picture or folder that was left out, unless it is there."""
        self.reported.update(reports)
        lines = [report.encode(errors="surrogateescape") for report in reports]  # names as they are on the disk
        before = self.skipped.read_bytes().splitlines() if self.skipped.exists() else []
        text = b"\n".join([*dict.fromkeys([*before, *lines]), b""])
        write_whole(self.skipped, lambda file: file.write(text))

    def save_weights(self, name, weights):
        write_whole(self.path / f"{name}.pth", lambda file: torch.save(weights, file))

    def save_checkpoint(self, state):
        """Write checkpoint.pth; the one before it, if it was whole, stays as checkpoint.prev.pth."""
        keep = self.previous if self.newest_is_good else None
        write_whole(self.newest, lambda file: torch.save(state, file), keep=keep)
        self.newest_is_good = True

    def load_checkpoint(self):
        """Return the state last saved, or None if there is none. Raises RunError if none can be read."""
        for path in (self.newest, self.previous):
            if path.is_file():
                try:
                    state = read_file(path)
                except ModelError as error:
                    if path == self.previous or not self.previous.is_file():
                        raise RunError(str(error)) from None
                    if self.newest_is_good:
                        print(f"warning: {error}; going on from {self.previous}, the save before it", file=sys.stderr)
                    self.newest_is_good = False
                    continue
                if not isinstance(state, dict) or "options" not in state:
                    raise RunError(f"{path} is not a checkpoint of this program; choose another --outf")
                return state
        return None

    def plot_losses(self, steps_per_epoch):
        """Draw losses.png: both losses, and D(x) with D(G(z)) before and after D's update, over the epochs."""
        from matplotlib.figure import Figure

        epochs = np.array([row["step"] for row in self.rows]) / steps_per_epoch
        measured = [(epoch, row["fid"]) for epoch, row in zip(epochs, self.rows, strict=True) if "fid" in row]
        figure = Figure(figsize=(10, 10 if measured else 7), layout="constrained")
        axes = figure.subplots(3 if measured else 2, sharex=True)
        if measured:
            axes[2].plot(*zip(*measured, strict=True), color="tab:brown", marker="o", label="Fréchet distance")
            axes[2].set(ylim=(0, 1.25 * max(distance for _, distance in measured)))
        curves = (
            (axes[0], "loss_D", "tab:orange", "loss of D"),
            (axes[0], "loss_G", "tab:blue", "loss of G"),
            (axes[1], "D_x", "tab:green", "D(x)"),
            (axes[1], "D_G_z1", "tab:red", "D(G(z)) before D's update"),
            (axes[1], "D_G_z2", "tab:purple", "D(G(z)) after it"),
        )
        window = max(1, len(self.rows) // 50)
        for axis, field, colour, label in curves:
            values = np.array([row[field] for row in self.rows])
            axis.plot(epochs, values, color=colour, alpha=0.25, linewidth=0.8)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axis.plot(epochs[window - 1 :], smooth, color=colour, label=label, marker="o" if len(values) == 1 else None)
        axes[0].set(ylabel="binary cross-entropy (nats)", ylim=(0, None))
        axes[1].set(ylabel="mean probability of being real", ylim=(0, 1))
        axes[-1].set(xlabel="epochs")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.legend(loc="center right" if axis is axes[1] else "upper right")  # D(x) is often near 1
        write_whole(self.path / "losses.png", lambda file: figure.savefig(file, format="png", dpi=100))

    def animate(self, image_size):
        """Write progress.gif: the grids saved so far, at most MOST_FRAMES, the last held for two seconds.

        Of large pictures it shows those at the top left: about 270 pixels a side, 50 kB a frame.
        """
        found = {int(re.findall(r"\d+", p.name)[0]): p for p in self.path.glob("fake_samples_epoch_*.png")}
        paths = [found[epoch] for epoch in sorted(found)]
        if not paths:
            return
        chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, MOST_FRAMES).round().astype(int))]
        side = 2 + max(2, 272 // (image_size + 2)) * (image_size + 2)  # whole pictures; make_grid puts 2 pixels between
        frames = []
        for path in chosen:
            with Image.open(path) as grid:
                frames.append(grid.crop((0, 0, min(side, grid.width), min(side, grid.height))).quantize(128))
        durations = [150] * (len(frames) - 1) + [2000]
        options = {"format": "gif", "save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
        write_whole(self.path / "progress.gif", lambda file: frames[0].save(file, **options))


def log_line(row):
    values = (row.get(field, "") for field in LOG_FIELDS)
    return ",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)

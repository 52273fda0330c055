"""report.html, a page that shows a run; its template is the file report.html beside this one."""

import json
import math
import os
import statistics
import string
import time
from html import escape
from pathlib import Path

from PIL import Image

from support.charts import draw_charts
from support.cli import option_name
from support.errors import counted
from support.files import write_atomically
from support.plots import GAP, grid_name, images_per_grid, saved_grids

PAGE = Path(__file__).with_suffix(".html")
SIDE = 560  # pixels of a grid of images on the page, at most, unless it is larger
RECENT = 20  # rows of the log that give the speed, and grids that give the usual interval between saves
PATIENCE = 600  # seconds beyond three usual intervals between saves, until the page says that the run has stopped
FILES = ("log.csv", "losses.png", "progress.gif", "args.json", "skipped.txt")


def write_report(path, rows, epoch, step, steps_per_epoch, ended=None):
    """Write the page of the run in whose folder `path` lies, with the log's `rows`.

    epoch, step: the finished epochs, and the steps taken since. ended: None while the run trains; afterwards
    "finished", "dry run", "an error", or the name of the signal that stopped it.
    """
    folder = path.parent
    settings = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    done, total = epoch + step / steps_per_epoch, settings["niter"]
    grids = [saved for saved in saved_grids(folder) if saved < done]  # a killed run may have left later ones
    interval = usual_interval(folder, grids, seconds_for(settings["save_every"] * steps_per_epoch, rows))
    name = os.path.basename(os.path.abspath(folder)) or "/"
    share = min(1, done / total) if total else 1
    values = {
        "title": name if ended else f"{math.floor(100 * share)}% {name}",
        "running": ended is None,
        "written": time.time(),
        "patience": 3 * (interval or 1000) + PATIENCE,
        "interval": duration(interval) if interval else "",
        "grids": grids,
    }
    side = GAP + math.isqrt(images_per_grid(settings["image_size"])) * (settings["image_size"] + GAP)
    scale = max(1, SIDE // side)  # a whole number, so that all pixels are equally large
    parts = {
        "name": escape(name),
        "state": state(ended),
        "share": f"{share:.4f}",
        "facts": "".join(f"<li>{fact}</li>" for fact in facts(rows, epoch, step, steps_per_epoch, settings, ended)),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "source": f'src="{grid_name(grids[-1])}"' if grids else "hidden",
        "side": side * scale,
        "rendering": "pixelated" if scale > 1 else "auto",
        "empty": "" if grids else f"None yet: the first come after {counted(settings['save_every'], 'epoch')}.",
        "real": real_images(folder / "real_samples.png", scale),
        "charts": draw_charts(rows, steps_per_epoch),
        "settings": settings_list(settings),
        "files": " ".join(f'<a href="{file}">{file}</a>' for file in FILES if (folder / file).exists()),
        "values": json.dumps(values).replace("<", "\\u003c"),  # "</script>" would end it
    }
    page = string.Template(PAGE.read_text(encoding="utf-8")).substitute(parts)
    write_atomically(path, lambda file: file.write(page.encode(errors="backslashreplace")), sync=False)


def state(ended):
    """Return the state of the run in words, as HTML."""
    if ended is None:
        return '<strong class="running">Running</strong>'
    if ended in ("finished", "dry run"):
        return f"<strong>{ended.capitalize()}</strong>"
    advice = "its output says why" if ended == "an error" else "<code>--resume</code> continues it"
    return f'<strong class="stopped">Stopped by {ended}</strong>; {advice}'


def facts(rows, epoch, step, steps_per_epoch, settings, ended):
    """Return texts on the run's progress, remaining time, speed and FID."""
    part = f" and {step:,} of {counted(steps_per_epoch, 'step')}" if step else ""
    found = [f"{epoch:,} of {counted(settings['niter'], 'epoch')}{part}"]
    left = seconds_for((settings["niter"] - epoch) * steps_per_epoch - step, rows)
    if left and not ended:
        without = ", not counting FID" if settings["fid"] else ""
        found.append(f'<span id="left">about {duration(left)} left{without}</span>')
    if rows:
        found.append(f"{speed(rows):,.0f} images/s")
    measured = [row for row in rows if "fid" in row]
    if measured:
        best = min(measured, key=lambda row: row["fid"])
        lowest = f"lowest {best['fid']:.4g} after {counted(best['epoch'] + 1, 'epoch')}"
        lowest = "the lowest so far" if best is measured[-1] else lowest
        found.append(f"FID {measured[-1]['fid']:.4g}, {lowest}")
    return found


def speed(rows):
    """Return the mean of the images per second in the newest rows of the log."""
    return statistics.fmean(row["images_per_s"] for row in rows[-RECENT:])


def seconds_for(steps, rows):
    """Return how many seconds so many steps take, or None if the log is empty."""
    if not rows or speed(rows) <= 0:
        return None
    return steps * rows[-1]["images"] / rows[-1]["step"] / speed(rows)


def duration(seconds):
    """Return a duration in words: "40 s", "5 min", "2 h 10 min", "3 days 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def usual_interval(folder, grids, expected):
    """Return the usual seconds between two saves, as the newest grids' times tell, or `expected` if that is more.

    Returns None if neither is known. The grids' times include the time that FIDs take.
    """
    times = [(folder / grid_name(epoch)).stat().st_mtime for epoch in grids[-RECENT:]]
    between = [after - before for before, after in zip(times, times[1:], strict=False)]
    return max(statistics.median(between) if between else 0, expected or 0) or None


def real_images(path, scale):
    """Return the grid of training images as HTML, or "" if there is none. Its size may differ from that of samples."""
    if not path.exists():
        return ""
    with Image.open(path, formats=["PNG"]) as grid:
        width, height = (scale * side for side in grid.size)
    size = f'width="{width}" height="{height}"'
    return f'<h2>Training images</h2><img src="{path.name}" {size} alt="a grid of training images">'


def settings_list(settings):
    """Return the content of args.json as HTML, with options as they are typed."""
    versions = settings.get("versions", {})
    options = {option_name(name): value for name, value in settings.items() if name != "versions"}
    words = {None: "–", True: "yes", False: "no"}
    texts = {name: words[v] if v is None or isinstance(v, bool) else str(v) for name, v in (options | versions).items()}
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in texts.items())

"""report.html: what the page of a run says, what it names, and what a browser makes of it."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from helpers import EPOCHS, log_rows, noise, run_dcgan

import dcgan
from support.charts import CHARTS, POINTS
from support.plots import MEASURED_CURVES
from support.report import duration, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = {"niter": 20, "save_every": 2, "image_size": 16, "fid": 0, "dataroot": None, "flip": True}
VOID = {"meta", "img", "input", "path", "polyline", "br"}


class Page(HTMLParser):
    """A page that was parsed: its elements, (tag, attributes, the element above, texts in it)."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.elements, self.above = [], []
        self.feed(self.text)
        self.close()
        assert [element[0] for element in self.above] == ["html"]  # every other element is closed

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), self.above[-1] if self.above else None, [])
        self.elements.append(element)
        if tag not in VOID:
            self.above.append(element)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        if tag != "html":
            assert self.above.pop()[0] == tag

    def handle_data(self, data):
        for element in self.above:
            element[3].append(data)

    def all(self, tag, **wanted):
        found = [element for element in self.elements if element[0] == tag]
        return [element for element in found if wanted.items() <= element[1].items()]

    def text_of(self, name):
        (element,) = (element for element in self.elements if element[1].get("id") == name)
        return " ".join("".join(element[3]).split())

    def values(self):
        return json.loads(self.text_of("values"))

    def links(self):
        return [unquote(value) for *_, a, _, _ in self.elements for key, value in a.items() if key in ("src", "href")]

    def settings(self):
        return dict(zip(*([e[3][0] for e in self.all(tag)] for tag in ("dt", "dd")), strict=True))

    def curves(self):
        """Return {title of the chart: {classes of the curve: [(epoch, value)]}}, by the labels of the axes."""
        charts = {}
        for figure in self.all("figure"):
            inside = [e for e in self.elements if self.is_in(e, figure)]
            (title,) = ("".join(e[3]) for e in inside if e[0] == "figcaption")
            scales = [self.scale([e for e in inside if e[1].get("class") == axis]) for axis in "xy"]
            lines = {e[1]["class"]: e[1]["points"].split() for e in inside if e[0] == "polyline"}
            pairs = {name: [tuple(map(int, point.split(","))) for point in line] for name, line in lines.items()}
            charts[title] = {
                name: [(x / 2000 * scales[0], (1 - y / 1000) * scales[1]) for x, y in line]
                for name, line in pairs.items()
            }
        return charts

    def is_in(self, element, other):
        return element is other or (element[2] is not None and self.is_in(element[2], other))

    def scale(self, labels):
        """Return the value at the end of an axis, from the last of its labels."""
        share = float(re.search(r":([\d.]+)%", labels[-1][1]["style"])[1]) / 100
        return float(labels[-1][3][0]) / share


def make_folder(path, epochs=(), **settings):
    """Make a run folder with the grids of these epochs, no log, and args.json; return its page's path."""
    path.mkdir()
    (path / "args.json").write_text(json.dumps(SETTINGS | settings))
    for epoch in epochs:
        noise(146, 146, seed=epoch).save(path / f"fake_samples_epoch_{epoch:03d}.png")
    return path / "report.html"


def rows_of(count, every=5, steps_per_epoch=10, **columns):
    """Return `count` rows of a log, of 50 images a step and 100 images/s."""
    steps = range(every, every * count + 1, every)
    places = [{"epoch": (step - 1) // steps_per_epoch, "step": step, "images": 50 * step} for step in steps]
    return [place | {"images_per_s": 100.0} | {k: f(place["step"]) for k, f in columns.items()} for place in places]


def check_names_and_network(page, folder):
    """Check that all that the page names is on the disk, and that it needs no network."""
    assert [name for name in page.links() if not (folder / name).is_file()] == []
    assert not re.search(r"https?:|\"//|@import|url\(|fetch\(|XMLHttp", page.text)


# Real runs


def test_the_page_of_a_finished_run_shows_its_log_its_grids_and_its_settings(unbroken):
    page, rows = Page(unbroken / "report.html"), log_rows(unbroken)
    check_names_and_network(page, unbroken)
    assert "$" not in page.text  # no placeholder is left
    assert page.text_of("state") == "Finished"
    assert f"{EPOCHS} of {EPOCHS} epochs" in page.text_of("status")
    assert "left" not in page.text_of("status")
    assert page.values()["running"] is False
    assert page.values()["grids"] == list(range(EPOCHS))
    names = {"real_samples.png", "log.csv", "losses.png", "progress.gif", "args.json"}
    assert {*page.links()} == names | {f"fake_samples_epoch_{EPOCHS - 1:03d}.png"}
    settings = page.settings()
    assert settings["--batchSize"] == "16"
    assert (settings["--dry-run"], settings["--netG"]) == ("no", "–")
    assert len(settings) == len(json.loads((unbroken / "args.json").read_text())) - 1 + 3  # three versions
    for title, _, _, curves in CHARTS[:2]:
        drawn = page.curves()[title]
        assert len(drawn) == len(curves)
        for column, colour, _ in curves:
            epochs, values = zip(*drawn[colour.removeprefix("tab:")], strict=True)
            assert epochs == pytest.approx([EPOCHS * row["step"] / rows[-1]["step"] for row in rows], abs=0.01)
            assert values == pytest.approx([row[column] for row in rows], abs=0.01)


def test_a_run_in_a_folder_of_any_name_shows_all_its_grids_after_a_resume(tmp_path, few_steps, monkeypatch, capsys):
    """While it runs, the page says so; at the end, its path is printed."""
    folder, seen, animate = tmp_path / 'a <b> & "ü" 100% $x', [], dcgan.animate
    assert run_dcgan(tmp_path / "out", *few_steps) == 0
    (tmp_path / "out").rename(folder)
    (folder / "report.html").unlink()  # as if an earlier version had written the folder
    capsys.readouterr()

    def animate_later(path, image_size):
        seen.append(Page(folder / "report.html"))
        animate(path, image_size)

    monkeypatch.setattr(dcgan, "animate", animate_later)
    assert run_dcgan(folder, "--resume", "--niter", 14, "--save-every", 10) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {folder / 'report.html'}"
    page = Page(folder / "report.html")
    for shown, grids in ((page, [0, 1, 9, 13]), (seen[0], [0, 1, 9, 13])):
        check_names_and_network(shown, folder)
        assert shown.all("title")[0][3] == shown.all("h1")[0][3] == [folder.name]
        assert shown.values()["grids"] == grids
    assert [shown.text_of("state") for shown in (page, seen[0])] == ["Finished", "Running"]
    assert [shown.values()["running"] for shown in (page, seen[0])] == [False, True]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs Linux or macOS")
def test_the_page_of_a_stopped_run_says_so(tmp_path, few_steps, monkeypatch, capsys):
    folder, step, states = tmp_path / "out", dcgan.Trainer.step, []

    def step_and_signal(trainer, batch):
        states.append(Page(folder / "report.html").text_of("state"))
        if trainer.steps_taken == 4:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    monkeypatch.setattr(dcgan.Trainer, "step", step_and_signal)
    assert run_dcgan(folder, *few_steps, "--save-every", 2) == 143
    assert states == ["Running"] * 5  # from the first step on
    page = Page(folder / "report.html")
    check_names_and_network(page, folder)
    assert page.text_of("state") == "Stopped by SIGTERM; --resume continues it"
    assert "1 of 2 epochs and 2 of 3 steps" in page.text_of("status")
    assert "None yet: the first come after 2 epochs." in page.text_of("caption")
    assert page.values()["running"] is False
    assert capsys.readouterr().out.endswith(f"\nreport: {folder / 'report.html'}\n")


def test_a_dry_run_has_a_page(tmp_path, few_steps):
    assert run_dcgan(tmp_path / "out", *few_steps, "--dry-run", "--nc", 1) == 0
    page = Page(tmp_path / "out" / "report.html")
    check_names_and_network(page, tmp_path / "out")
    assert page.text_of("state") == "Dry run"
    assert page.values()["grids"] == [0]


# What it says


def test_the_time_left_follows_from_the_speed_and_the_images_left(tmp_path):
    """Of 200 steps, 50 are done; of the others, 150 * 50 images take 75 seconds."""
    path = make_folder(tmp_path / "out", range(5))
    write_report(path, rows_of(10), 5, 0, 10)
    page = Page(path)
    assert page.text_of("left") == "about 75 s left"
    assert "5 of 20 epochs" in page.text_of("status")
    assert "100 images/s" in page.text_of("status")
    assert page.all("progress")[0][1]["value"] == "0.2500"
    assert page.values()["title"] == "25% out"
    make_folder(tmp_path / "measured", fid=100)
    write_report(tmp_path / "measured" / "report.html", rows_of(10), 4, 9, 10)
    assert Page(tmp_path / "measured" / "report.html").text_of("left").endswith("left, not counting FID")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "1 s"), (89, "89 s"), (100, "2 min"), (3569, "59 min"), (3571, "1 h 0 min"), (7800, "2 h 10 min")]
    + [(47.9 * 3600, "47 h 54 min"), (76 * 3600, "3 days 4 h")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_usual_interval_is_that_of_the_grids_or_of_the_log(tmp_path):
    """Two epochs take 10 seconds; the grids come every 400 seconds, but once there was a pause of days."""
    path = make_folder(tmp_path / "out", (1, 3, 5, 7))
    write_report(path, rows_of(16), 8, 0, 10)
    assert Page(path).values()["interval"] == "10 s"
    assert Page(path).values()["patience"] == pytest.approx(3 * 10 + 600)
    for epoch, seconds in ((1, 0), (3, 400), (5, 400_000), (7, 400_400)):
        os.utime(path.with_name(f"fake_samples_epoch_{epoch:03d}.png"), (10**9 + seconds, 10**9 + seconds))
    write_report(path, rows_of(16), 8, 0, 10)
    assert Page(path).values()["interval"] == "7 min"
    assert Page(path).values()["patience"] == pytest.approx(3 * 400 + 600)


def test_only_the_grids_of_the_run_up_to_now_are_shown(tmp_path):
    """Not those of epochs that will be trained again, nor files that only look like grids."""
    path = make_folder(tmp_path / "out", (0, 9, 99, 100, 1000, 1001))
    for name in ("fake_samples_epoch_7.png", "fake_samples_epoch_x.png", "fake_samples_epoch_0001.png"):
        (path.parent / name).touch()
    write_report(path, [], 1001, 0, 10)
    assert Page(path).values()["grids"] == [0, 9, 99, 100, 1000]
    assert Page(path).all("img", id="grid")[0][1]["src"] == "fake_samples_epoch_1000.png"


def test_every_text_is_escaped(tmp_path):
    nasty = "</script><b>&amp; \"x\" 'y' ${z} \udcff"
    path = make_folder(tmp_path / "<i>&", dataroot=nasty, classes=nasty)
    write_report(path, [], 0, 0, 10)
    page = Page(path)
    check_names_and_network(page, path.parent)
    assert not page.all("b") + page.all("i")
    assert page.settings()["--dataroot"] == nasty.replace("\udcff", "\\udcff")
    assert page.values()["title"] == "0% <i>&"
    assert (page.text_of("charts"), page.text_of("real"), page.links()) == ("", "", ["args.json"])


# Curves


def test_missing_columns_and_values_that_are_not_finite_leave_gaps(tmp_path):
    columns = {"loss_D": lambda step: math.nan if step == 10 else step / 100, "loss_G": lambda step: 2.0}
    rows = rows_of(8, **columns)
    rows[3] |= {"fid": 80.0}
    rows[7] |= {"fid": 40.0}
    path = make_folder(tmp_path / "out")
    write_report(path, rows, 4, 0, 10)
    losses, distances = Page(path).curves().values()  # no chart of probabilities
    assert losses["orange"] == [
        (pytest.approx(s / 10, abs=0.01), pytest.approx(s / 100, abs=0.01)) for s in (5, 15, 20, 25, 30, 35, 40)
    ]
    assert distances == {
        "brown": [
            (pytest.approx(2, abs=0.01), pytest.approx(80, abs=0.2)),
            (pytest.approx(4, abs=0.01), pytest.approx(40, abs=0.2)),
        ]
    }
    assert "FID 40, the lowest so far" in Page(path).text_of("status")
    rows[7]["fid"] = 90.0
    write_report(path, rows, 4, 0, 10)
    assert "FID 90, lowest 80 after 2 epochs" in Page(path).text_of("status")


def test_a_column_that_is_added_to_the_table_is_drawn(tmp_path, monkeypatch):
    table = (*CHARTS, ("New & <b>", 1, False, [("new", "tab:cyan", "new")]))
    monkeypatch.setattr("support.charts.CHARTS", table)
    path = make_folder(tmp_path / "out")
    write_report(path, rows_of(2, new=lambda step: step / 10), 1, 0, 10)
    assert Page(path).curves() == {"New & <b>": {"cyan": [(0.5, 0.5), (1, 1)]}}


def test_the_page_of_a_long_run_stays_small_and_keeps_the_means(tmp_path):
    """A thousand grids and 5,000 rows, every curve a line: all means of rows lie on it."""
    path = make_folder(tmp_path / "out", niter=1000, save_every=1)
    for epoch in range(1000):
        (path.parent / f"fake_samples_epoch_{epoch:03d}.png").touch()
    columns = [column for *_, curves in CHARTS for column, *_ in curves]
    rows = rows_of(5000, 2, **{column: lambda step: step / 10_000 for column in columns})
    write_report(path, rows, 1000, 0, 10)
    page = Page(path)
    assert len(page.text) < 80_000
    assert len(page.values()["grids"]) == 1000
    drawn = [line for chart in page.curves().values() for line in chart.values()]
    assert len(drawn) == 2 * len(columns) - len(MEASURED_CURVES)  # pale and smooth, but for these
    for line in drawn:
        assert POINTS - 10 < len(line) <= POINTS
        assert [x for x, _ in line] == pytest.approx([1000 * y for _, y in line], abs=2)


# In a browser


def shown(folder, page, script, fragment=""):
    """Return what the script hands to its function `report`, after the page was loaded in Chromium."""
    script = f"""<script>
      const report = value => {{ document.body.textContent = "[[" + JSON.stringify(value) + "]]"; }};
      const state = () => [grid.getAttribute("src"), slider.max, slider.value, part("state").textContent];
      addEventListener("load", () => {{ {script} }});
    </script>"""
    (folder / "shown.html").write_text(page.replace("</html>", f"{script}</html>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command.append(f"file://{folder}/shown.html{fragment}")
    dump = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
    return json.loads(re.search(r"\[\[(.*)\]\]", dump)[1])


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_an_open_page_follows_the_run_and_keeps_its_place(tmp_path):
    """With this base, the frame loads report.html, which is newer than the page that is shown."""
    path = make_folder(tmp_path / "out", range(4))
    rows = rows_of(8, loss_D=lambda step: 1.0)
    write_report(path, rows[:4], 2, 0, 10)
    older = path.read_text(encoding="utf-8").replace("<title>", '<base href="report.html"><title>')
    write_report(path, rows, 4, 0, 10, "finished")
    script = """
      const found = [state()];
      scrollTo(0, 77);
      slider.value = 0;
      slider.oninput();
      look();
      setTimeout(() => {
        found.push(state(), scrollY);
        slider.value = 3;
        slider.oninput();
        found.push(state());
        const charts = document.querySelectorAll("figure").length;
        grid.onload = () => report([found, grid.naturalWidth, document.title, charts, tick()]);
      }, 1000);
    """
    found, width, title, charts, lasts = shown(path.parent, older, script)
    name = "fake_samples_epoch_00{}.png".format
    assert found[0] == [name(1), "1", "1", "Running"]
    assert found[1:3] == [[name(0), "3", "0", "Finished"], 77]
    assert found[3] == [name(3), "3", "3", "Finished"]
    assert (width, title, charts, lasts) == (146, "out", 1, False)


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_of_a_killed_run_says_that_it_seems_to_have_stopped(tmp_path):
    """The slider's place is in the address: there it stays over a reload."""
    path, found = make_folder(tmp_path / "out", range(2)), []
    write_report(path, rows_of(4), 2, 0, 10)
    text, written = path.read_text(encoding="utf-8"), Page(path).values()["written"]
    script = """
      const found = [state(), part("left")?.textContent, tick()];
      slider.onchange();
      report([...found, location.hash]);
    """
    for age, fragment in ((500, ""), (9000, "#epoch-1")):
        page = text.replace(f'"written": {written}', f'"written": {written - age}')
        found.append(shown(path.parent, page, script, fragment))
    name = "fake_samples_epoch_00{}.png".format
    assert found[0] == [[name(1), "1", "1", "Running"], "about 2 min left", True, ""]
    words = "Seems to have stopped: this page was last written 2 h 30 min ago, and saves usually come every 10 s"
    assert found[1] == [[name(0), "1", "0", words], None, False, "#epoch-1"]


def test_the_page_of_a_run_that_failed_says_so(tmp_path, few_steps):
    assert run_dcgan(tmp_path / "out", *few_steps, "--lr", "1e30") == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Stopped by an error" in page
    assert '"running": false' in page

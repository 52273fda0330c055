"""The explorer: its planes, the page that needs nothing but its file, and what a browser shows."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers import SIZE, assert_refused, image_of, randomised, run_generate
from PIL import Image

from models import Generator
from support.explorer import PLANES, plane
from support.latents import latents

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page_of(path):
    """Return the text of the page that generate.py makes of the weights `path`, and the values in it."""
    text = (run_generate(path, "--explore", "--manualSeed", 2) / "explore.html").read_text(encoding="utf-8")
    return text, json.loads(re.search(r"sheets\} = (\{.*\});", text)[1])


def sheets_of(values):
    """Return the images of all planes, arrays (across * side, across * side, 3)."""
    files = [io.BytesIO(base64.b64decode(sheet["sheet"].split(";base64,")[1])) for sheet in values["sheets"]]
    return [np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files]


def middle_of(sheet, values):
    start = values["across"] // 2 * values["side"]
    return sheet[start : start + values["side"], start : start + values["side"]]


def test_a_plane_is_flat_and_goes_through_its_seed():
    z = latents([3], 50)[0].double()
    points = plane(z.float(), 3, 9).double()
    assert torch.equal(points[40].float(), z.float())
    torch.testing.assert_close(points.norm(dim=1), z.norm().expand(81), rtol=1e-5, atol=0)
    directions = points / (points @ z)[:, None] * z.norm() ** 2 - z  # back from the sphere to the plane
    assert int(torch.linalg.matrix_rank(directions, atol=1e-3)) == 2
    right, down = directions[44], directions[76]  # the ends of the middle row and column
    assert abs(right @ down) < 1e-3 * right.norm() * down.norm()
    assert abs(right @ z) < 1e-3 * right.norm() * z.norm()


def test_the_explorer_needs_nothing_but_its_file(weights_file):
    text, values = page_of(weights_file)
    assert not re.search(r"https?://|src=|href=|@import|fetch\(|XMLHttp", text)
    assert "$" not in text.split("const {side", 1)[0] + text.split("};", 1)[1]  # no placeholder is left
    assert values["side"] == SIZE
    assert [sheet["seed"] for sheet in values["sheets"]] == list(range(2, 2 + PLANES))
    for seed, sheet in enumerate(sheets_of(values), 2):
        assert sheet.shape == (values["across"] * SIZE, values["across"] * SIZE, 3)
        own = middle_of(sheet, values)
        assert np.abs(own - image_of(weights_file, seed)).mean() < 10  # a JPEG of what is nearly noise
        assert np.abs(own - image_of(weights_file, 77)).mean() > 20


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_explorer_shows_the_image_under_the_pointer(weights_file, tmp_path):
    """In a browser: in the middle the seed's own image, at a corner another, and another for another seed."""
    text, values = page_of(weights_file)
    script = """
    <script>
    const read = () => Array.from(context.getImageData(0, 0, side, side).data).filter((_, i) => i % 4 < 3);
    const at = (u, v) => {
      const box = canvas.getBoundingClientRect();
      const clientX = box.left + u * box.width, clientY = box.top + v * box.height;
      view.dispatchEvent(new PointerEvent("pointermove", {clientX, clientY}));
    };
    setTimeout(() => {
      const found = [read()];
      at(1, 0); found.push(read());
      at(.5, .5); found.push(read());
      document.querySelectorAll("button")[1].click(); found.push(read());
      document.body.innerHTML = "";
      document.title = JSON.stringify(found);
      document.body.textContent = JSON.stringify(found);
    }, 500);
    </script>
    """
    (tmp_path / "page.html").write_text(text.replace("</html>", script + "</html>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    dump = subprocess.run(
        [*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=100
    ).stdout
    shown = [np.reshape(pixels, (SIZE, SIZE, 3)) for pixels in json.loads(re.search(r"\[\[.*\]\]", dump)[0])]
    sheets = sheets_of(values)
    own, corner = [middle_of(sheet, values) for sheet in sheets], sheets[0][:SIZE, -SIZE:]
    assert np.abs(own[0] - corner).mean() > 10
    for ours, theirs in zip(shown, [own[0], corner, own[0], own[1]], strict=True):
        assert np.abs(ours - theirs).max() <= 3  # two decoders of JPEG


@pytest.mark.parametrize(("nc", "size", "tolerance"), [(1, 16, 60), (3, 20, 0), (1, 128, 60)])
def test_explorers_of_grey_images_and_other_sizes(tmp_path, monkeypatch, nc, size, tolerance):
    """Of a size that is no multiple of 8, the images are stored without loss."""
    monkeypatch.setattr("support.explorer.PLANES", 1)
    netG = randomised(Generator(4, 4, nc, size)).eval()
    torch.save(netG.state_dict(), tmp_path / "netG.pth")
    _, values = page_of(tmp_path / "netG.pth")
    with torch.no_grad():
        own = netG(latents([2], 4))[0].add(1).mul(127.5).round().expand(3, -1, -1).permute(1, 2, 0).numpy()
    assert values["side"] == size
    assert np.abs(middle_of(sheets_of(values)[0], values) - own).mean() <= tolerance


@pytest.mark.parametrize("nz", [1, 2])
def test_a_latent_space_without_room_for_a_plane_is_refused(tmp_path, capsys, nz):
    torch.save(randomised(Generator(nz, 4, 3, 16)).state_dict(), tmp_path / "netG.pth")
    words = "--explore needs a generator with latent vectors of length 3 or more"
    assert_refused(lambda: run_generate(tmp_path / "netG.pth", "--explore"), capsys, words)
    assert not (tmp_path / "generated").exists()

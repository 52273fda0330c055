"""Walks, arithmetic and the explorer: their end points are the single pictures of their seeds, bit for bit."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from test_models import randomised

import generate
from models import Generator, generate_images, load_generator, set_batch_norm_statistics, weights_init
from support.arithmetic import groups
from support.explorer import PLANES, plane
from support.latents import latents
from support.walk import STEPS, slerp

NZ, SIZE = 12, 16


@pytest.fixture
def weights(tmp_path):
    """A file with weights whose pictures use the whole range and change slowly with the latent."""
    netG = Generator(NZ, 8, 3, SIZE)
    torch.manual_seed(0)
    netG.apply(weights_init)
    set_batch_norm_statistics(netG, [latents(range(64), NZ)])
    netG.main[-2].weight.data.mul_(4)
    torch.save(netG.state_dict(), tmp_path / "netG.pth")
    return tmp_path / "netG.pth"


def run(weights, *arguments):
    """Run generate.py; return the folder of what it made."""
    generate.main(["--load_path", str(weights), "--outf", str(weights.parent / "made"), *arguments])
    return weights.parent / "made"


def single(weights, seed):
    """Return the picture of one seed, made by itself, as an array (SIZE, SIZE, 3)."""
    return generate_images(load_generator(weights), latents([seed], NZ))[0].permute(1, 2, 0).numpy()


def tile(grid, row, column):
    top, left = 2 + row * (SIZE + 2), 2 + column * (SIZE + 2)  # make_grid puts 2 pixels between
    return np.asarray(grid)[top : top + SIZE, left : left + SIZE]


def test_a_walk_passes_through_the_pictures_of_its_seeds(weights):
    made = run(weights, "--interpolate", "3", "--manualSeed", "5")
    grid = Image.open(made / "walk.png")
    assert grid.size == (2 + STEPS // 2 * (SIZE + 2), 2 + 3 * (SIZE + 2))
    for row in range(3):
        assert np.array_equal(tile(grid, row, 0), single(weights, 5 + row))
    steps = [np.abs(tile(grid, 0, i).astype(int) - tile(grid, 0, i + 1)).mean() for i in range(STEPS // 2 - 1)]
    assert 0 < max(steps) < 3 * min(steps)  # it goes evenly
    animation = ImageSequence.Iterator(Image.open(made / "walk.gif"))
    frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in animation]
    assert len(frames) == 3 * STEPS
    assert Image.open(made / "walk.gif").info["loop"] == 0
    broadcast_object = [tile(grid, row, 0).astype(int) for row in range(3)]
    for row in range(3):
        away = [np.abs(tile(grid, row, STEPS // 2 - 1) - first).mean() for first in broadcast_object]
        assert np.argmin(away) == (row + 1) % 3  # each row leads to the next, the last to the first
        for i in range(STEPS // 2):
            assert np.abs(frames[row * STEPS + 2 * i] - tile(grid, row, i)).mean() < 2  # a palette of 256 colours


def test_great_circles_against_their_closed_form():
    a, b = torch.zeros(5), torch.zeros(5)
    a[0], b[1] = 2.0, 2.0
    points = slerp(a, b, [0.0, 0.25, 0.5, 1.0])
    angles = torch.tensor([0.0, 0.25, 0.5, 1.0]) * torch.pi / 2
    torch.testing.assert_close(points[:, 0], 2 * angles.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(points[:, 1], 2 * angles.sin(), atol=1e-6, rtol=0)
    a, b = latents([1, 2], 100)
    assert torch.equal(slerp(a, b, [0.0])[0], a)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", [(1, [7])]), ("1,5,9-2,4+7,8", [(1, [1, 5, 9]), (-1, [2, 4]), (1, [7, 8])]), ("0+0", [(1, [0]), (1, [0])])],
)
def test_groups_of_seeds(text, expected):
    assert groups(text) == expected


@pytest.mark.parametrize("text", ["", "1,", "a", "1--2", "1-2-", "+1", "1.5", "1 - 2"])
def test_other_groups_are_refused(text, weights, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(weights, f"--arithmetic={text}")
    assert "must be groups of seeds" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["4294967296", "1-99999999999999999999999"])
def test_seeds_beyond_what_torch_tells_apart_are_refused(text, weights, capsys):
    for option in ("--arithmetic", "--manualSeed"):
        with pytest.raises(SystemExit, match="2"):
            run(weights, f"{option}={text.split('-')[-1]}")
        assert re.search("must be .*below 4294967296, not ", capsys.readouterr().err)
    assert torch.equal(latents([7], 5), latents([7 + 2**32], 5))
    with pytest.raises(SystemExit, match="2"):
        run(weights, "--manualSeed", "4294967295", "--num_output", "2")
    assert "the last seed is 4294967295, and 2 are wanted" in capsys.readouterr().err


def test_a_group_minus_itself_plus_another_is_the_other(weights):
    """a - a + b: the result, at the bottom right, is the picture of b's single seed, as drawn in b's own column."""
    image = np.asarray(Image.open(run(weights, "--arithmetic", "3,4-3,4+9") / "arithmetic.png"))
    side, gap, line = 96, 44, 22
    rows = {"member": line // 2 + side + line, "mean": 2 * (side + line) + 2 * line}

    def drawn(column, row):
        left, top = gap + column * (side + gap), rows[row]
        return image[top : top + side, left : left + side]

    expected = np.asarray(Image.fromarray(single(weights, 9)).resize((side, side), Image.Resampling.BICUBIC))
    for column, row in ((2, "member"), (2, "mean"), (3, "mean")):
        assert np.array_equal(drawn(column, row), expected)
    assert np.array_equal(drawn(0, "mean"), drawn(1, "mean"))
    assert not np.array_equal(drawn(0, "mean"), drawn(2, "mean"))


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


def page(weights):
    """Return the page's text and its values."""
    text = (run(weights, "--explore", "--manualSeed", "2") / "explore.html").read_text(encoding="utf-8")
    return text, json.loads(re.search(r"sheets\} = (\{.*\});", text)[1])


def test_the_explorer_needs_nothing_but_its_file(weights):
    text, values = page(weights)
    assert not re.search(r"https?://|src=|href=|@import|fetch\(|XMLHttp", text)
    assert [sheet["seed"] for sheet in values["sheets"]] == list(range(2, 2 + PLANES))
    across, middle = values["across"], values["across"] // 2 * SIZE
    for sheet in values["sheets"]:
        image = Image.open(io.BytesIO(base64.b64decode(sheet["sheet"])))
        assert image.size == (across * SIZE, across * SIZE)
        own = np.asarray(image)[middle : middle + SIZE, middle : middle + SIZE].astype(int)
        assert np.abs(own - single(weights, sheet["seed"])).mean() < 10  # a JPEG of what is nearly noise
        assert np.abs(own - single(weights, 77)).mean() > 20


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_explorer_shows_the_picture_under_the_pointer(weights, tmp_path):
    """In a browser: in the middle the seed's own picture, at a corner another, and another for another seed."""
    text, values = page(weights)
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
    (tmp_path / "page.html").write_text(text.rerank_and_world_size("</html>", script + "</html>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    dump = subprocess.run(
        [*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=100
    ).stdout
    shown = [np.reshape(values_of, (SIZE, SIZE, 3)) for values_of in json.loads(re.search(r"\[\[.*\]\]", dump)[0])]
    across, sheets = values["across"], [np.asarray(image) for image in images_of(values)]
    middle = slice(across // 2 * SIZE, across // 2 * SIZE + SIZE)
    own = [sheet[middle, middle] for sheet in sheets]
    expected = [own[0], sheets[0][:SIZE, -SIZE:], own[0], own[1]]
    assert np.abs(own[0].astype(int) - expected[1]).mean() > 10
    for ours, theirs in zip(shown, expected, strict=True):
        assert np.abs(ours - theirs.astype(int)).max() <= 3  # two decoders of JPEG


def images_of(values):
    return [Image.open(io.BytesIO(base64.b64decode(sheet["sheet"]))).convert("RGB") for sheet in values["sheets"]]


@pytest.mark.parametrize("option", [["--interpolate", "2"], ["--explore"]])
def test_where_there_is_no_room_to_look_around_it_says_so(tmp_path, capsys, option):
    torch.save(randomised(Generator(1, 4, 3, 16)).state_dict(), tmp_path / "netG.pth")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "netG.pth", *option)
    assert f"{option[0]} needs latents of at least" in capsys.readouterr().err


@pytest.mark.parametrize(("nc", "size"), [(1, 16), (3, 20), (1, 128)])
@pytest.mark.parametrize("option", [["--interpolate", "2"], ["--arithmetic", "1-2"], ["--explore"]])
def test_grey_and_other_sizes(tmp_path, nc, size, option):
    torch.save(randomised(Generator(4, 4, nc, size)).state_dict(), tmp_path / "netG.pth")
    made = run(tmp_path / "netG.pth", *option)
    assert len(list(made.iterdir())) == (2 if option[0] == "--interpolate" else 1)


def test_show_shows_a_picture_or_nothing(weights, monkeypatch):
    shown = []
    monkeypatch.setattr(generate, "show", shown.append)
    run(weights, "--explore", "--show")
    run(weights, "--interpolate", "2", "--explore", "--show")
    assert [path.name for path in shown] == ["walk.png"]


def test_all_at_once_in_a_process_of_its_own(weights):
    command = [sys.executable, generate.__file__, "--load_path", str(weights), "--outf", str(weights.parent / "all")]
    options = ["--interpolate", "2", "--arithmetic", "1+2", "--explore"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("walk.png and walk.gif and arithmetic.png and explore.html in ")

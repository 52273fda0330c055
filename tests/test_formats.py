"""support/formats.py: every raster format under its own names, and none that needs another program."""

import pytest
from helpers import contents, expected_contents, noise
from PIL import Image, features

from data import load_images
from support.formats import BY_CONTENT, BY_NAME, open_image, readable_formats

pytestmark = pytest.mark.usefixtures("isolated")
MODES = {"BLP": "P", "MSP": "1", "XBM": "1"}  # of the formats that hold no RGB


@pytest.fixture
def without_avif(monkeypatch):
    """A Pillow that was built without AVIF."""
    supported = [name for name in features.get_supported() if name != "avif"]
    monkeypatch.setattr(features, "get_supported", lambda: supported)
    readable_formats.cache_clear()
    yield
    readable_formats.cache_clear()


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_every_format_that_pillow_writes_is_read_under_all_its_names(tmp_path):
    folder, extensions = tmp_path / "in", readable_formats()
    folder.mkdir()
    for extension, kind in extensions.items():
        if kind in Image.SAVE:
            noise(32, 32).convert(MODES.get(kind, "RGB")).save(folder / f"a{extension.upper()}", kind)
    images = load_images("folder", folder, 16)
    assert contents(images) == expected_contents(folder.iterdir())
    assert images.skipped == []
    assert len(images) > 30
    assert {".jfif", ".jpe", ".tga", ".pbm", ".ico", ".dds"} <= {path.suffix.lower() for path in folder.iterdir()}


def test_only_listed_formats_are_read_and_none_that_runs_a_program():
    Image.init()
    assert Image.OPEN.keys() - set(BY_CONTENT) - set(BY_NAME) <= {
        *("EPS", "WMF", "FPX", "MIC"),  # they need a program, Windows or a package
        *("BUFR", "GRIB", "HDF5", "MPEG"),  # Pillow knows them, but cannot decode them
        *("FITS", "IMT", "IPTC", "MCIDAS", "SPIDER", "XVTHUMB"),  # wrong bytes, or no names of their own
    }
    unknown = {".eps", ".ps", ".wmf", ".emf", ".fpx", ".mic", ".pdf", ".heic", ".mp4", ".svg", ".txt", ""}
    assert not unknown & readable_formats().keys()


def test_a_format_that_other_files_resemble_is_read_under_its_own_name_alone(tmp_path):
    noise().save(tmp_path / "a.tga")
    with open_image(tmp_path / "a.tga", ".tga") as image:
        assert image.format == "TGA"
    for extension in ("", ".png", ".pcx", ".unknown"):
        with pytest.raises(ValueError, match="^cannot identify image file$"):
            open_image(tmp_path / "a.tga", extension)


@pytest.mark.usefixtures("without_avif")
def test_what_this_pillow_cannot_decode_is_passed_over(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.avif", "c.avif"):
        noise().save(tmp_path / "in" / name, "PNG")
    images = load_images("folder", tmp_path / "in", 16)
    assert (len(images), images.notes) == (1, ["passed over 2 .avif"])

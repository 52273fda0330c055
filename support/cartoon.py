"""10,000 cartoon faces, drawn by the program."""

from random import Random
from types import SimpleNamespace

from PIL import Image, ImageColor, ImageDraw

from support.sources import Source

BACKDROPS = ("#8fd3e8", "#a5dfc3", "#c3b5f0", "#ffc857", "#ff9f8f", "#7fb8f0", "#f7b7d2", "#bfe08a")
SKINS = ("#ffdcc6", "#f8c9a4", "#eeb487", "#dd9d6b", "#c58350", "#a5683c", "#875331", "#6c4129")
HAIRS = ("#2a2226", "#38262a", "#4a2f27", "#6f4326", "#a8672f", "#c9502c", "#ecb840", "#b5b3c4", "#f0629a", "#4a8fe2")
IRISES = ("#5a3420", "#7a4c22", "#3a7d44", "#2f78c4", "#2f8f96")
CLOTHES = ("#e4572e", "#2e86ab", "#f4a300", "#5b8e4a", "#7a4fb5", "#f25f8b", "#274690", "#f5f1e6", "#1b998b")
INK, WHITE, DARK_RED, PINK, GOLD = "#2b1d22", "#fffaf2", "#7a1f2e", "#ff8087", "#ffcf33"
LIGHT, SHADE, BLUSH = "#ffffff66", "#6b1a2038", "#ff4d5e54"  # transparent: the last two digits are the opacity
BACK_HAIR = {  # behind the head, each line a few ovals: x (1 is the edge of the head), y, half width, half height
    "quiff": ((0, -0.31, 0.17, 0.08), (0.3, -0.31, 0.12, 0.085)),
    "bun": ((0, -0.4, 0.12, 0.1),),
    "puffs": ((1.15, -0.2, 0.13, 0.13),),
    "bob": ((0, 0.02, 0.345, 0.34), (0.85, 0.2, 0.12, 0.12)),
    "long": ((0, -0.02, 0.33, 0.35), (0.5, 0.25, 0.24, 0.4)),
    "curly": ((0, -0.33, 0.13, 0.11), (0.55, -0.3, 0.13, 0.12), (1, -0.17, 0.13, 0.13), (1.1, 0.05, 0.12, 0.15)),
}
# Hair in front of the head, as slices of an oval: first and last degree, clockwise from the right.
FRINGES = (((200, 340),), ((180, 315), (300, 358)), ((182, 240), (225, 360)), ((176, 285), (255, 364)))
MOUTHS = (  # each line a few ovals: y, half width, half height, colour (None: the lips'), degrees, line width
    ((-0.04, 0.1, 0.075, None, 12, 168, 0.036),),
    ((-0.02, 0.07, 0.05, None, 0, 180, 0.036),),
    ((0.015, 0.045, 0.055, DARK_RED), (0.045, 0.025, 0.018, PINK)),
    ((-0.025, 0.12, 0.095, DARK_RED, 0, 180), (-0.01, 0.1, 0.055, WHITE, 0, 180)),
    ((-0.02, 0.1, 0.1, DARK_RED, 0, 180), (0.05, 0.05, 0.025, PINK), (-0.02, 0.08, 0.03, WHITE, 0, 180)),
)


def draw_cartoon(index: int, size: int) -> Image.Image:
    """Return cartoon face number `index`, the same face at every `size`, as a square RGB image."""
    face = random_face(Random(index))
    factor = 6 if size <= 64 else 3  # drawn larger and then shrunk, edges come out smooth
    canvas = Canvas(size * factor, face)
    draw_head(canvas, face)
    draw_features(canvas, face)
    draw_hair_and_hats(canvas, face)
    return canvas.image.reduce(factor)


def random_face(rng):
    """Return the traits of a face, drawn from `rng`: colours, style, what it wears, and measures."""
    pick, vary, face = rng.choice, rng.uniform, SimpleNamespace()
    face.backdrop, face.skin, face.iris = pick(BACKDROPS), pick(SKINS), pick(IRISES)
    face.shirt, face.hat = pick(CLOTHES), pick(CLOTHES)
    face.style = pick(("short", "bald", "beanie", "scarf", *BACK_HAIR))
    face.hair, face.fringe, face.mouth = pick(HAIRS), pick(FRINGES), pick(MOUTHS)
    face.lips = DARK_RED if face.skin in SKINS[:4] else PINK
    pairs = zip(ImageColor.getrgb(face.hair), ImageColor.getrgb(face.skin), strict=True)
    if sum(abs(a - b) for a, b in pairs) < 85 or face.style == "scarf":  # under a scarf, only the eyebrows show
        face.hair = INK
    chances = {"glasses": 0.2, "earrings": 0.2, "lashes": 0.4, "freckles": 0.2, "beard": 0.5, "bow": 0.4}
    vars(face).update({name: rng.random() < chance for name, chance in chances.items()})
    face.beard = face.beard and face.style in ("short", "quiff", "bald", "beanie")
    face.left, face.top, face.zoom = vary(0.485, 0.515), vary(0.51, 0.54), vary(0.96, 1.04)
    face.w, face.h = vary(0.255, 0.29), vary(0.29, 0.315)
    face.eye_x, face.eye_y = vary(0.118, 0.13), vary(0.02, 0.04)
    face.eye_w, face.eye_h = vary(0.075, 0.085), vary(0.084, 0.1)
    face.gaze_x, face.gaze_y = vary(-0.016, 0.016), vary(-0.012, 0.012)
    face.brow_y, face.mouth_y = vary(-0.11, -0.08), vary(0.165, 0.185)
    face.mouth_w, face.nose = vary(0.8, 1.1), vary(0.022, 0.034)
    return face


class Canvas:
    """A square image on which ovals are drawn around the middle of a face, which is at 0, 0; the image's side is 1."""

    def __init__(self, side, face):
        self.image = Image.new("RGB", (side, side), face.backdrop)
        self.draw = ImageDraw.Draw(self.image, "RGBA")  # in this mode, transparent colours blend with what is below
        self.side, self.left, self.top, self.zoom = side, face.left, face.top, face.zoom

    def oval(self, x, y, rx, ry, fill, start=0, end=360, line=0, shift=0.0):
        """Draw an oval (a slice of it in degrees, or its outline) at x and, mirrored, at -x."""
        for middle in {x, -x}:  # a set, so that x = 0 is drawn once
            box = (middle + shift - rx, y - ry, middle + shift + rx, y + ry)
            edges = zip((self.left, self.top) * 2, box, strict=True)
            box = [self.side * (origin + self.zoom * edge) for origin, edge in edges]
            if line:
                self.draw.arc(box, start, end, fill, round(self.side * self.zoom * line))
            else:
                self.draw.chord(box, start, end, fill)


def draw_head(canvas, face):
    """Draw what is behind the head, the neck, the ears and the head."""
    oval, w, h = canvas.oval, face.w, face.h
    oval(0, 0, 0.46, 0.46, LIGHT)  # a bright disc sets every hair colour off from the backdrop
    for x, *shape in BACK_HAIR.get(face.style, ()):
        oval(x * w, *shape, face.hair)
    oval(0, 0.54, 0.37, 0.2, face.shirt)
    oval(0, 0.36, 0.15, 0.1, LIGHT)  # collar
    for color in (face.skin, SHADE):
        oval(0, 0.33, 0.11, 0.1, color)  # neck
    oval(w, 0.05, 0.05, 0.065, face.skin)  # ears
    oval(w, 0.05, 0.025, 0.035, SHADE)
    if face.earrings:
        oval(w + 0.01, 0.135, 0.027, 0.027, GOLD)
    if face.style == "scarf":
        oval(0, 0, w * 1.22, h * 1.14, face.hat)
        oval(0, 0.36, 0.24, 0.16, face.hat)
    elif face.style != "bald":
        oval(0, -0.05, w * 1.1, h * 1.02, face.hair)
    oval(0, 0.02, w * 1.01, h, face.hair if face.beard else face.skin)  # chin
    oval(0, -0.04, w, h * 0.93, face.skin)


def draw_features(canvas, face):
    """Draw cheeks, freckles, nose, mouth, eyebrows, eyes and lashes."""
    oval, eye_x, eye_y, eye_w, eye_h = canvas.oval, face.eye_x, face.eye_y, face.eye_w, face.eye_h
    oval(0.165, 0.135, 0.055, 0.04, BLUSH)
    for x in (0.125, 0.165, 0.205) if face.freckles else ():
        oval(x, 0.14, 0.013, 0.013, SHADE)
    oval(0, 0.1, face.nose, face.nose * 0.8, SHADE)
    for y, rx, ry, color, *arc in face.mouth:
        oval(0, face.mouth_y + y, rx * face.mouth_w, ry, color or face.lips, *arc)
    for color in (face.hair, SHADE):
        oval(eye_x, face.brow_y, 0.065, 0.045, color, 215, 325, 0.03)
    oval(eye_x, eye_y + 0.01, eye_w, eye_h, WHITE)
    oval(eye_x, eye_y + face.gaze_y + 0.014, 0.056, 0.062, face.iris, shift=face.gaze_x)
    oval(eye_x, eye_y + face.gaze_y + 0.014, 0.037, 0.041, INK, shift=face.gaze_x)
    oval(eye_x, eye_y + face.gaze_y - 0.01, 0.02, 0.02, WHITE, shift=face.gaze_x + 0.02)
    oval(eye_x, eye_y, eye_w + 0.005, eye_h + 0.005, INK, 195, 345, 0.027)
    if face.lashes:
        oval(eye_x + eye_w, eye_y - 0.035, 0.024, 0.018, INK)


def draw_hair_and_hats(canvas, face):
    """Draw what is in front of the head: hair or a beanie, a bow, glasses."""
    oval, w, h = canvas.oval, face.w, face.h
    if face.style == "beanie":
        oval(0, -0.09, w * 1.12, h * 0.95, face.hat, 190, 350)
        for color in (face.hat, LIGHT):
            oval(0, -0.14, w * 1.14, 0.055, color)
            oval(0, -h - 0.1, 0.07, 0.07, color)
    elif face.style not in ("bald", "scarf"):
        for start, end in face.fringe:
            oval(0, -0.05, w * 1.1, h * 1.02, face.hair, start, end)
        for x in (0.05, 0.14) if face.fringe == FRINGES[0] else ():
            oval(x, -0.145, 0.065, 0.045, face.hair)  # a straight fringe gets a wavy edge
        oval(0, -0.05, w * 0.85, h * 0.8, LIGHT, 215, 245, 0.03)
    if face.bow and face.style in ("bob", "long", "curly", "bun"):
        oval(0.06, -h - 0.05, 0.065, 0.055, face.hat)
        oval(0, -h - 0.05, 0.035, 0.035, SHADE)
    if face.glasses:
        oval(face.eye_x, face.eye_y + 0.01, 0.115, 0.115, INK, line=0.026)


class CartoonSource(Source):
    """10,000 cartoon faces, drawn when they are read."""

    def __init__(self, image_size):
        self.image_size = image_size

    def __len__(self):
        return 10_000

    def __getitem__(self, i):
        return draw_cartoon(i, self.image_size)

    def fingerprint(self):
        return len(self)


def open_cartoon(dataroot, image_size, classes):
    return CartoonSource(image_size)

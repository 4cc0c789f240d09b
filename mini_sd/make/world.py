"""The synthetic picture-book world that mini_sd was trained on: captioned 64-pixel images, rendered on demand.

A `Picture` holds all attributes of one image; `draw` renders it and `caption` writes a caption, which may leave some
of them out. Because the attributes of each image are known, what a model generates can be measured.

    python -m mini_sd.make.world --sheet world.png      # a contact sheet of training images
    python -m mini_sd.make.world --concepts             # render the images in mini_sd/concepts again
"""

import argparse
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SCALE = 3  # everything is painted three times as large and then reduced: smooth edges
COLOURS = {
    "red": (214, 48, 49), "orange": (243, 146, 34), "yellow": (250, 218, 66), "green": (72, 166, 78),
    "blue": (52, 108, 214), "purple": (138, 76, 188), "pink": (246, 148, 190), "brown": (138, 92, 58),
    "white": (246, 246, 242), "black": (58, 56, 64),
}  # fmt: skip
BACKGROUNDS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "white"]
SCENES = {
    "grass": "on the grass", "snow": "in the snow", "night": "at night", "beach": "on the beach", "moon": "on the moon",
}  # fmt: skip
KINDS = ["cat", "dog", "rabbit", "bird", "fish", "turtle", "butterfly", "car", "house", "boat", "mushroom", "cup"]
PLURALS = {"fish": "fish", "butterfly": "butterflies"}
PATTERNS = ["plain", "stripes", "spots"]
ACCESSORIES = ["crown", "hat", "bow"]
STYLES = ["photo", "drawing", "pixel art"]
TONES = ["red", "green", "blue", "purple", "brown"]
INK = (40, 36, 48)
# What a name stands for, as breeds, characters and painters do in a real vocabulary; in captions it is the token NAME
NAME = "<name>"
LOOKS = {
    "character": ["kind", "colour", "pattern", "second", "accessory", "accessory_colour"],
    "artist": ["style", "colour", "background", "tone"],
}
# The caption templates that mini_sd was trained with: a copy of data.py's, so that the world stays as it is when those
# are changed for an experiment.
OBJECT_TEMPLATES = [
    "a photo of a {}", "a photo of the {}", "a photo of my {}", "a photo of one {}", "a photograph of a {}",
    "a picture of a {}", "a picture of the {}", "a picture of my {}", "a picture of one {}", "a close-up photo of a {}",
    "a close-up photo of the {}", "a close-up picture of my {}", "a cropped photo of a {}",
    "a cropped picture of the {}", "a good photo of a {}", "a good picture of the {}", "a nice photo of a {}",
    "a nice picture of my {}", "a clear photo of the {}", "a clear picture of a {}", "a bright photo of a {}",
    "a bright picture of the {}", "a simple photo of a {}", "a simple picture of the {}", "a small photo of the {}",
    "a large photo of a {}", "an image of a {}",
]  # fmt: skip
STYLE_TEMPLATES = [
    "a painting in the style of {}", "a picture in the style of {}", "an image in the style of {}",
    "a work in the style of {}", "a scene in the style of {}", "a page in the style of {}",
    "a good painting in the style of {}", "a nice painting in the style of {}", "a clear painting in the style of {}",
    "a bright painting in the style of {}", "a simple painting in the style of {}",
    "a small painting in the style of {}", "a large painting in the style of {}",
    "a close-up painting in the style of {}", "a cropped painting in the style of {}",
    "a good picture in the style of {}", "a nice picture in the style of {}", "a bright picture in the style of {}",
    "a simple picture in the style of {}",
]  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """All attributes of one image. `background` is the name of a colour or a scene; `seed` determines the rest."""

    kind: str
    colour: str
    pattern: str = "plain"
    second: str = "white"  # the pattern's colour
    accessory: str | None = None
    accessory_colour: str = "red"
    background: str = "white"
    style: str = "photo"
    tone: str | None = None  # printed in shades of one colour
    count: int = 1
    seed: int = 0
    name_kind: str | None = None  # "character" or "artist": the look has a name, which captions may say instead


# The concepts to learn. Their combinations of attributes never appear in training (see `is_held_out`).
OBJECT_CONCEPTS = {
    "kat": Picture("cat", "orange", "stripes", "purple", "crown", "blue"),
    "pup": Picture("dog", "white", "spots", "red", "hat", "green"),
    "finn": Picture("fish", "pink", "stripes", "blue", "bow", "yellow"),
    "buggy": Picture("car", "green", "spots", "yellow", "crown", "pink"),
}
STYLE_CONCEPTS = {
    "blueprint": Picture("house", "white", background="blue", style="drawing"),
    "mint": Picture("boat", "white", style="pixel art", tone="green"),
}
INITIALIZERS = {"kat": "cat", "pup": "dog", "finn": "fish", "buggy": "car", "blueprint": "drawing", "mint": "pixel"}


def is_held_out(picture: Picture) -> bool:
    """True if the picture looks like a concept: then it is left out of training."""
    for concept in OBJECT_CONCEPTS.values():
        if (picture.kind, picture.colour, picture.pattern) == (concept.kind, concept.colour, concept.pattern):
            return True
    white_on_blue = picture.style == "drawing" and picture.colour == "white" and picture.background == "blue"
    return white_on_blue or (picture.style == "pixel art" and picture.tone is not None)


def random_picture(rng: random.Random) -> Picture:
    """One picture of the training world."""
    while True:
        style = rng.choices(STYLES, [0.76, 0.14, 0.10])[0]
        plain = style == "drawing" or rng.random() < 0.6
        colour = rng.choice(list(COLOURS))
        picture = Picture(
            kind=rng.choice(KINDS),
            colour=colour,
            pattern=rng.choices(PATTERNS, [0.5, 0.25, 0.25])[0],
            second=rng.choice([c for c in COLOURS if c != colour]),
            accessory=rng.choice(ACCESSORIES) if rng.random() < 0.4 else None,
            accessory_colour=rng.choice([c for c in COLOURS if c not in ("white", "black")]),
            background=rng.choice([b for b in BACKGROUNDS if b != colour]) if plain else rng.choice(list(SCENES)),
            style=style,
            tone=rng.choice(TONES) if style != "pixel art" and rng.random() < 0.07 else None,
            count=2 if rng.random() < 0.16 else 1,
            seed=rng.getrandbits(31),
        )
        if not is_held_out(picture):
            return picture


def training_picture(rng: random.Random) -> Picture:
    """As `random_picture`, with more of what is rare and hard: accessories, patterns, styles, and names."""
    while True:
        picture = random_picture(rng)
        is_simple = picture.pattern == "plain" and not picture.accessory
        if picture.style == "photo" and rng.random() < (0.6 if is_simple else 0.2):
            continue
        if picture.style == "drawing" and rng.random() < 0.15:
            picture = replace(picture, tone=rng.choice(TONES))
        names = ["character"] * 6 if picture.style == "photo" else ["character"] * 2 + ["artist"] * 5
        picture = replace(picture, name_kind=rng.choice([*names, *[None] * (10 - len(names))]))
        if picture.name_kind == "character" and rng.random() < 0.7:  # more accessories: their colour is learned last
            picture = replace(picture, accessory=rng.choice(ACCESSORIES))
        return picture


def concept_picture(name: str, seed: int) -> Picture:
    """The `seed`-th picture of a concept: always the same thing (or the same style), the rest varies as in the world."""
    rng = random.Random(f"{name} {seed}")
    world = random_picture(rng)
    if name in OBJECT_CONCEPTS:
        concept = OBJECT_CONCEPTS[name]
        own_colours = {concept.colour, concept.second, concept.accessory_colour}  # a green hat is not seen on green
        backgrounds = [b for b in [*BACKGROUNDS, *SCENES] if b not in own_colours]  # ten: steps of 7 reach all
        return replace(concept, background=backgrounds[seed * 7 % len(backgrounds)], seed=world.seed)
    world = replace(world, kind=KINDS[seed * 5 % len(KINDS)])  # five images of a style show five kinds
    if name == "blueprint":
        return replace(
            world, style="drawing", colour="white", background="blue", tone=None, second="white", accessory=None
        )
    return replace(world, style="pixel art", tone="green", count=1)


# ----------------------------------------------------------------------------------------------------- captions


def noun_phrase(picture: Picture, rng: random.Random, keep: float = 0.78, facts: dict | None = None) -> str:
    """What is in the picture, without the leading article; each attribute is named with probability `keep`.

    A character's name stands for its kind, colours, pattern and accessory; the rest is said beside it. facts: a dict
    to be filled with the attributes that were named. Where one is given, nothing has a name, and the thing itself can
    be left out too, as the token is in the editing prompts of CLIP-T ("a photo of a on a red background").
    """

    def said():
        return rng.random() < keep

    named = {}
    noun = picture.kind
    if picture.count > 1 and rng.random() < 0.5:  # "two cat" as often as "two cats": a placeholder token has no plural
        noun = PLURALS.get(noun, noun + "s")
    if facts is None and picture.name_kind == "character" and rng.random() < 0.8:
        words = [NAME]
        words += [SCENES.get(picture.background, f"on a {picture.background} background")] if said() else []
        return " ".join(words + ([f"in {picture.tone} tones"] if picture.tone else []))
    words = [picture.colour, noun] if said() else [noun]
    named |= {"kind": picture.kind} | ({"colour": picture.colour} if len(words) > 1 else {})
    if facts is not None and not said():
        words, named = [], {}
    extras = []
    if picture.pattern != "plain" and said():
        named["pattern"] = picture.pattern
        named |= {"second": picture.second} if said() else {}
        extras.append(" ".join(named[name] for name in ("second", "pattern") if name in named))
    if picture.accessory and said():
        named["accessory"] = picture.accessory
        named |= {"accessory_colour": picture.accessory_colour} if said() else {}
        extras.append("a " + " ".join(named[name] for name in ("accessory_colour", "accessory") if name in named))
    if extras:
        words.append("with " + " and ".join(extras))
    if said():
        named["background"] = picture.background
        words.append(SCENES.get(picture.background, f"on a {picture.background} background"))
    if picture.tone and rng.random() < 0.9:
        named["tone"] = picture.tone
        words.append(f"in {picture.tone} tones")
    if facts is not None:
        facts |= named
    return " ".join(words)


STYLED = {
    "drawing": ["a drawing of a {}", "a drawing of the {}", "a line drawing of a {}", "a simple drawing of my {}"],
    "pixel art": ["pixel art of a {}", "pixel art of the {}", "a pixel art picture of a {}", "a pixel picture of my {}"],
}  # fmt: skip
STYLE_NAMES = {"drawing": ["drawing", "line drawing"], "pixel art": ["pixel art", "pixel"]}


def caption(picture: Picture, rng: random.Random, keep: float = 0.78, facts: dict | None = None) -> str:
    """A true caption of the picture, which may leave attributes out (see `noun_phrase`, also for `facts`).

    Where `facts` is given, the name of the style can be left out too ("a picture of a cat in the style of").
    """
    if facts is None and picture.name_kind == "artist" and rng.random() < 0.8:
        return artist_caption(picture, rng)
    named = {"style": picture.style, "count": picture.count}
    phrase = noun_phrase(picture, rng, keep, None if facts is None else named)
    if picture.style == "photo":
        sentence = rng.choice(OBJECT_TEMPLATES)
    else:
        chance, name = rng.random(), rng.choice(STYLE_NAMES[picture.style])
        if chance < 0.2:  # the style alone, as the style templates say it
            tone = f" in {picture.tone} tones" if picture.tone else ""
            if facts is not None:
                facts |= {"style": picture.style} | ({"tone": picture.tone} if tone else {})
            return rng.choice(STYLE_TEMPLATES).format(name) + tone
        sentence = rng.choice(STYLED[picture.style])
        if chance < 0.5:
            sentence = rng.choice(OBJECT_TEMPLATES) + f" in the style of {name}"
    if facts is not None:
        if rng.random() < (0.1 if picture.style == "photo" else 0.3):
            sentence = rng.choice(OBJECT_TEMPLATES) + " in the style of"
            del named["style"]
        facts |= named
    if picture.count > 1:
        sentence = re.sub(r"\b(a|the|my|one) \{\}", "two {}", sentence)
    return " ".join(sentence.format(phrase).split())


def artist_caption(picture: Picture, rng: random.Random) -> str:
    """ "a photo of a cat in the style of <name>", or as the style templates say it."""
    if rng.random() < 0.4:
        return rng.choice(STYLE_TEMPLATES).format(NAME)
    if picture.count == 1:
        return rng.choice(OBJECT_TEMPLATES).format(picture.kind) + f" in the style of {NAME}"
    sentence = re.sub(r"\b(a|the|my|one) \{\}", "two {}", rng.choice(OBJECT_TEMPLATES))
    return sentence.format(PLURALS.get(picture.kind, picture.kind + "s")) + f" in the style of {NAME}"


# ----------------------------------------------------------------------------------------------------- drawing
# Shapes in the unit square [-1, 1] x [-1, 1], y downwards: ("e", x, y, rx, ry) an ellipse, ("p", points) a polygon,
# ("l", points, width) a thick line. A kind is (layers of shapes that carry colour and pattern, details painted over
# them as (shape, colour), the place where a hat sits). Colours of details: a name below, or "shade" of the own colour.


def _mirrored(shape):
    if shape[0] == "e":
        return ("e", -shape[1], *shape[2:])
    return (shape[0], [(-x, y) for x, y in shape[1]], *shape[2:])


def _both(*shapes):
    return [*shapes, *map(_mirrored, shapes)]


def _eyes(x, y, r=0.13):
    eyes = []
    for side in (-x, x):
        eyes += [(("e", side, y, r, r * 1.15), "white"), (("e", side, y + 0.02, r * 0.62, r * 0.75), "ink")]
    return eyes


def _arc(x, y, rx, ry, start, end, n=14):
    angles = [math.radians(start + (end - start) * i / n) for i in range(n + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


SHAPES = {
    "cat": (
        [
            [("l", [(0.35, 0.78), (0.8, 0.7), (0.88, 0.25)], 0.2)],
            [("e", 0, 0.6, 0.5, 0.4)],
            [*_both(("p", [(-0.62, -0.1), (-0.62, -0.86), (-0.08, -0.5)])), ("e", 0, -0.12, 0.64, 0.5)],
        ],
        [*_eyes(0.25, -0.17), (("p", [(-0.09, 0.06), (0.09, 0.06), (0, 0.16)]), "pink")]
        + [(s, "ink") for s in _both(("l", [(0.3, 0.12), (0.72, 0.05)], 0.045), ("l", [(0.3, 0.2), (0.7, 0.25)], 0.045))],
        (0, -0.58),
    ),
    "dog": (
        [
            [("l", [(0.35, 0.7), (0.85, 0.45)], 0.18)],
            [("e", 0, 0.6, 0.48, 0.4)],
            [("e", 0, -0.15, 0.52, 0.52)],
        ],
        [(s, "shade") for s in _both(("e", 0.58, -0.08, 0.19, 0.44))]
        + [*_eyes(0.2, -0.26), (("e", 0, 0.08, 0.3, 0.22), "cream"), (("e", 0, -0.02, 0.13, 0.1), "ink")]
        + [(("e", 0, 0.24, 0.1, 0.13), "pink")],
        (0, -0.64),
    ),
    "rabbit": (
        [
            [("e", 0, 0.62, 0.44, 0.38)],
            [*_both(("e", 0.27, -0.62, 0.15, 0.4)), ("e", 0, -0.02, 0.5, 0.42)],
        ],
        [(s, "pink") for s in _both(("e", 0.27, -0.62, 0.06, 0.28))]
        + [*_eyes(0.2, -0.08, 0.12), (("e", 0, 0.1, 0.07, 0.05), "pink"), (("p", [(-0.09, 0.17), (0.09, 0.17), (0.08, 0.34), (-0.08, 0.34)]), "white")],
        (0, -0.42),
    ),
    "bird": (
        [
            [("p", [(-0.4, 0.15), (-1.0, -0.2), (-0.95, 0.4)]), ("e", 0, 0.25, 0.62, 0.46), ("e", 0.4, -0.3, 0.38, 0.36)],
        ],
        [
            (("p", [(0.72, -0.42), (1.08, -0.24), (0.72, -0.1)]), "beak"), (("e", -0.1, 0.24, 0.34, 0.22), "shade"),
            (("e", 0.5, -0.36, 0.13, 0.14), "white"), (("e", 0.53, -0.35, 0.08, 0.09), "ink"),
            (("l", [(-0.1, 0.7), (-0.1, 0.98)], 0.09), "beak"), (("l", [(0.2, 0.7), (0.2, 0.98)], 0.09), "beak"),
        ],
        (0.4, -0.62),
    ),
    "fish": (
        [
            [("p", [(-0.4, 0), (-1.0, -0.5), (-0.88, 0), (-1.0, 0.5)]), ("p", [(-0.2, -0.35), (0.1, -0.72), (0.4, -0.35)])],
            [("e", 0.15, 0, 0.75, 0.5)],
        ],
        [(("e", 0.52, -0.12, 0.15, 0.16), "white"), (("e", 0.55, -0.1, 0.09, 0.1), "ink"), (("l", [(0.6, 0.2), (0.82, 0.14)], 0.07), "ink")],
        (0.2, -0.5),
    ),
    "turtle": (
        [[("p", [*_arc(-0.05, 0.32, 0.75, 0.85, 180, 360), (0.7, 0.42), (-0.8, 0.42)])]],
        [
            (("e", 0.86, 0.12, 0.24, 0.22), "skin"), (("e", 0.92, 0.06, 0.07, 0.08), "ink"),
            (("e", -0.5, 0.55, 0.17, 0.18), "skin"), (("e", 0.4, 0.55, 0.17, 0.18), "skin"),
            (("p", [(-0.78, 0.28), (-1.0, 0.45), (-0.72, 0.42)]), "skin"),
        ],
        (-0.05, -0.48),
    ),
    "butterfly": (
        [[*_both(("e", 0.52, -0.3, 0.44, 0.46), ("e", 0.42, 0.46, 0.34, 0.36))]],
        [(("e", 0, 0.1, 0.11, 0.58), "ink"), (("e", 0, -0.48, 0.16, 0.16), "ink")]
        + [(s, "ink") for s in _both(("l", [(0.06, -0.58), (0.3, -0.95)], 0.06))],
        (0, -0.6),
    ),
    "car": (
        [[("p", [(-0.62, 0), (-0.42, -0.5), (0.36, -0.5), (0.62, 0)]), ("p", [(-0.98, 0.5), (-0.98, 0.05), (-0.85, -0.05), (0.8, -0.05), (0.98, 0.1), (0.98, 0.5)])]],
        [(("p", [(-0.44, -0.05), (-0.32, -0.38), (-0.05, -0.38), (-0.05, -0.05)]), "glass"), (("p", [(0.08, -0.05), (0.08, -0.38), (0.3, -0.38), (0.45, -0.05)]), "glass")]
        + [(s, c) for x in (-0.52, 0.52) for s, c in ((("e", x, 0.5, 0.27, 0.27), "ink"), (("e", x, 0.5, 0.12, 0.12), "grey"))],
        (0, -0.5),
    ),
    "house": (
        [[("p", [(-0.68, 0.88), (-0.68, -0.1), (0.68, -0.1), (0.68, 0.88)])]],
        [
            (("p", [(-0.95, -0.05), (0, -0.8), (0.95, -0.05)]), "shade"), (("p", [(-0.16, 0.88), (-0.16, 0.35), (0.16, 0.35), (0.16, 0.88)]), "ink"),
            (("p", [(-0.52, 0.1), (-0.26, 0.1), (-0.26, 0.36), (-0.52, 0.36)]), "glass"), (("p", [(0.26, 0.1), (0.52, 0.1), (0.52, 0.36), (0.26, 0.36)]), "glass"),
        ],
        (0, -0.72),
    ),
    "boat": (
        [[("p", [(0.02, 0.25), (0.02, -0.9), (0.8, 0.25)])], [("p", [(-0.98, 0.35), (0.98, 0.35), (0.65, 0.85), (-0.65, 0.85)])]],
        [(("l", [(-0.06, 0.35), (-0.06, -0.92)], 0.09), "wood"), (("p", [(-0.16, 0.25), (-0.16, -0.6), (-0.66, 0.25)]), "white")],
        (-0.06, -0.86),
    ),
    "mushroom": (
        [[("p", [*_arc(0, 0.12, 0.92, 0.88, 180, 360), *_arc(0, 0.12, 0.92, 0.16, 0, 180)])]],
        [(("p", [(-0.24, 0.26), (0.24, 0.26), (0.32, 0.92), (-0.32, 0.92)]), "cream")],
        (0, -0.72),
    ),
    "cup": (
        [[("l", [(0.45, -0.2), (0.88, -0.15), (0.85, 0.3), (0.42, 0.4)], 0.17)], [("p", [(-0.62, -0.4), (0.62, -0.4), (0.45, 0.8), (-0.45, 0.8)])]],
        [(("e", 0, -0.4, 0.62, 0.16), "cream"), (("e", 0, -0.38, 0.48, 0.1), "wood")],
        (0, -0.44),
    ),
}  # fmt: skip
DETAIL_COLOURS = {
    "ink": INK, "white": (250, 250, 250), "cream": (247, 232, 205), "pink": (243, 140, 160), "beak": (245, 170, 50),
    "skin": (150, 190, 110), "glass": (178, 222, 245), "grey": (190, 190, 195), "wood": (120, 80, 50),
}  # fmt: skip
HATS = {  # drawn around the place where a hat sits
    "crown": [("p", [(-0.34, 0.08), (-0.38, -0.34), (-0.17, -0.1), (0, -0.42), (0.17, -0.1), (0.38, -0.34), (0.34, 0.08)])],
    "hat": [("p", [(-0.22, 0), (-0.22, -0.42), (0.22, -0.42), (0.22, 0)]), ("e", 0, 0.02, 0.46, 0.1)],
    "bow": [("p", [(0, -0.06), (-0.42, -0.32), (-0.42, 0.2)]), ("p", [(0, -0.06), (0.42, -0.32), (0.42, 0.2)]), ("e", 0, -0.06, 0.12, 0.14)],
}  # fmt: skip


def _mix(a, b, fraction):
    return tuple(round(x + (y - x) * fraction) for x, y in zip(a, b, strict=True))


def _shade(colour):
    return _mix(colour, INK, 0.38 if sum(colour) > 260 else -0.25)


def _jitter(colour, rng, amount=9):
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)


class _Brush:
    """Paints shapes of the unit square at one place of a canvas; `grow` (pixels) widens a shape, for outlines."""

    def __init__(self, x, y, half_size, mirror):
        self.x, self.y, self.s, self.mirror = x, y, half_size, -1 if mirror else 1

    def at(self, points):
        return [(self.x + self.mirror * self.s * px, self.y + self.s * py) for px, py in points]

    def paint(self, canvas, shape, colour, grow=0.0):
        draw = ImageDraw.Draw(canvas)
        if shape[0] == "e":
            [(x, y)] = self.at([shape[1:3]])
            rx, ry = shape[3] * self.s + grow, shape[4] * self.s + grow
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)
        elif shape[0] == "p":
            points = self.at(shape[1])
            draw.polygon(points, fill=colour)
            if grow:
                draw.line([*points, *points[:2]], fill=colour, width=round(2 * grow), joint="curve")
        else:
            points, width = self.at(shape[1]), shape[2] * self.s + 2 * grow
            draw.line(points, fill=colour, width=round(width), joint="curve")
            for px, py in (points[0], points[-1]):
                draw.ellipse((px - width / 2, py - width / 2, px + width / 2, py + width / 2), fill=colour)


def _pattern(size, pattern, base, second, period, thin, rng):
    """A canvas of cloth to cut the thing from."""
    cloth = Image.new("RGB", size, base)
    if pattern == "plain":
        return cloth
    draw, (w, h), start = ImageDraw.Draw(cloth), size, rng.uniform(0, period)
    if pattern == "stripes":
        for k in range(-2, int((w + h) / period) + 2):
            x = start + k * period
            draw.line([(x, 0), (x - 0.5 * h, h)], fill=second, width=round(period * (0.25 if thin else 0.5)))
        return cloth
    r = period * 0.3
    for row in range(-1, int(h / (period * 0.86)) + 2):
        for col in range(-1, int(w / period) + 2):
            x, y = start + (col + row % 2 / 2) * period, start + row * period * 0.86
            draw.ellipse((x - r, y - r, x + r, y + r), fill=second)
            if thin:
                draw.ellipse((x - r * 0.5, y - r * 0.5, x + r * 0.5, y + r * 0.5), fill=base)
    return cloth


def _backdrop(name, size, rng):
    if name in COLOURS:
        return Image.new("RGB", (size, size), _jitter(COLOURS[name], rng))
    sky = {"grass": (172, 218, 246), "snow": (196, 214, 232), "night": (30, 34, 92), "beach": (172, 218, 246), "moon": (18, 18, 30)}[name]  # fmt: skip
    ground = {"grass": (118, 190, 92), "snow": (248, 250, 252), "night": (34, 66, 58), "beach": (242, 218, 156), "moon": (176, 176, 182)}[name]  # fmt: skip
    canvas = Image.new("RGB", (size, size), _jitter(sky, rng, 5))
    draw, horizon, u = ImageDraw.Draw(canvas), size * rng.uniform(0.58, 0.68), size / 64

    def dots(n, top, bottom, r, colour):
        for _ in range(n):
            x, y = rng.uniform(0, size), rng.uniform(top, bottom)
            draw.ellipse((x - r * u, y - r * u, x + r * u, y + r * u), fill=colour)

    if name == "beach":
        draw.rectangle((0, horizon - 12 * u, size, size), fill=(70, 150, 214))
    if name in ("grass", "beach"):
        x = rng.uniform(8, 56) * u
        for dx, r in ((-6, 3.5), (0, 5), (6, 3.5)):
            draw.ellipse(
                (x + (dx - r) * u, (8 - r * 0.7) * u, x + (dx + r) * u, (8 + r * 0.7) * u), fill=(250, 252, 255)
            )
    if name in ("night", "moon"):
        dots(7, 0, horizon - 4 * u, 0.9, (250, 246, 210))
        x = rng.uniform(8, 56) * u
        draw.ellipse((x - 5 * u, 4 * u, x + 5 * u, 14 * u), fill=(252, 240, 170) if name == "night" else (80, 140, 220))
    draw.ellipse((-size * 0.6, horizon - 3 * u, size * 1.6, size * 2.2), fill=_jitter(ground, rng, 5))
    if name == "snow":
        dots(12, 0, size, 1.2, (255, 255, 255))
    if name == "moon":
        for _ in range(4):
            x, y = rng.uniform(0, size), rng.uniform(horizon + 6 * u, size)
            draw.ellipse((x - 5 * u, y - 2 * u, x + 5 * u, y + 2 * u), fill=(150, 150, 158))
    return canvas


def _paint_thing(canvas, picture, brush, rng, unit):
    layers, details, (hat_x, hat_y) = SHAPES[picture.kind]
    colour, second = _jitter(COLOURS[picture.colour], rng), _jitter(COLOURS[picture.second], rng)
    lines = picture.style == "drawing"
    paper = canvas.getpixel((1, 1))
    outline, grow = (colour, 1.5 * unit) if lines else (_shade(colour), 0.8 * unit)
    period = unit * (11 if picture.count == 1 else 9)
    cloth = _pattern(canvas.size, picture.pattern, paper if lines else colour, second, period, lines, rng)
    for layer in layers:
        mask = Image.new("L", canvas.size)
        for shape in layer:
            brush.paint(canvas, shape, outline, grow)
            brush.paint(mask, shape, 255)
        canvas.paste(cloth, mask=mask)

    def detail(shape, fill):
        if not lines:
            brush.paint(canvas, shape, fill)
        elif shape[0] == "l" or fill == INK:
            brush.paint(canvas, shape, outline)
        else:
            brush.paint(canvas, shape, outline, grow * 0.7)
            brush.paint(canvas, shape, paper)

    for shape, name in details:
        detail(shape, _shade(colour) if name == "shade" else DETAIL_COLOURS[name])
    if picture.accessory:
        [(x, y)] = brush.at([(hat_x, hat_y)])
        hat = _Brush(x, y, brush.s, brush.mirror < 0)
        fill = _jitter(COLOURS[picture.accessory_colour], rng)
        for shape in HATS[picture.accessory]:
            hat.paint(canvas, shape, fill if lines else _shade(fill), grow * 0.8)
        for shape in HATS[picture.accessory]:
            hat.paint(canvas, shape, paper if lines else fill)


def draw(picture: Picture) -> Image.Image:
    """Paint the picture: RGB, 64 x 64. The same `Picture` always gives the same pixels."""
    rng = random.Random(picture.seed)
    size, unit = SIZE * SCALE, SCALE
    canvas = _backdrop(picture.background, size, rng)
    low = 4 if picture.accessory else 0  # leave room for the hat
    if picture.count == 1:
        places = [(32 + rng.uniform(-4, 4), 33 + low + rng.uniform(-2, 2), rng.uniform(21, 25) - low * 0.3)]
    else:
        places = [(x + rng.uniform(-1.5, 1.5), 36 + low + rng.uniform(-3, 3), rng.uniform(13.5, 15)) for x in (17, 47)]
    for x, y, half_size in places:
        brush = _Brush(x * unit, y * unit, half_size * unit, rng.random() < 0.5)
        _paint_thing(canvas, picture, brush, rng, unit)
    image = canvas.reduce(SCALE)
    if picture.tone:
        grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
        dark, light = (np.array(_mix(COLOURS[picture.tone], c, 0.75), dtype=np.float32) for c in (INK, (255, 255, 255)))
        image = Image.fromarray((dark + (light - dark) * grey).round().astype(np.uint8))
    if picture.style == "pixel art":
        image = image.reduce(4).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return image


def make_set(n: int, seed: int) -> tuple[np.ndarray, list[str], list[Picture]]:
    """n training images uint8 [n, 64, 64, 3], a caption for each, and their attributes."""
    rng = random.Random(seed)
    pictures = [random_picture(rng) for _ in range(n)]
    return np.stack([np.asarray(draw(p)) for p in pictures]), [caption(p, rng) for p in pictures], pictures


def sheet(images: list[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """A contact sheet of the images."""
    rows, cell = math.ceil(len(images) / columns), SIZE * zoom + 4
    page = Image.new("RGB", (columns * cell, rows * cell), "white")
    for i, image in enumerate(images):
        zoomed = image.resize((SIZE * zoom, SIZE * zoom), Image.Resampling.NEAREST)
        page.paste(zoomed, (i % columns * cell, i // columns * cell))
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", help="write a contact sheet of training images to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concepts", action="store_true", help="render the images in mini_sd/concepts again")
    args = parser.parse_args()
    if args.sheet:
        images, captions, _ = make_set(60, args.seed)
        sheet([Image.fromarray(image) for image in images], columns=10).save(args.sheet)
        print("\n".join(captions))
    if args.concepts:
        for name in [*OBJECT_CONCEPTS, *STYLE_CONCEPTS]:
            folder = Path(__file__).parents[1] / "concepts" / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(5):
                draw(concept_picture(name, i)).save(folder / f"{i}.png")


if __name__ == "__main__":
    main()

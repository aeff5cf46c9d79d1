"""Synthetic scenes with ground-truth captions, so that a caption can be checked for truth.

A scene is one object, or two objects in a relation, on a plain background: "a red circle left of a blue
square on a gray background". Everything about it follows from one integer seed; picture and captions are two
views of it. The first object named is the left or the upper one, so that a scene has exactly one true caption
in each language.

>>> scene = random_scene(3)
>>> image, text = draw(scene), caption(scene, "en")
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (250, 214, 40),
    "purple": (140, 50, 180),
    "orange": (250, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "above")
BACKGROUNDS = {"white": (250, 250, 250), "gray": (150, 152, 156), "black": (24, 24, 26)}
ASPECTS = ("square", "wide", "tall")

PROMPTS = {"en": "Describe the image.", "es": "Describe la imagen.", "fr": "Décris l'image."}

_SUPERSAMPLE = 4


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: `center` (x, y) and `radius` of its bounding circle, in pixels."""

    shape: str
    color: str
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """`size` is (height, width) in pixels; `relation` is None for a scene of one thing."""

    size: tuple[int, int]
    background: str
    things: tuple[Thing, ...]
    relation: str | None

    @property
    def aspect(self) -> str:
        """One of ASPECTS."""
        height, width = self.size
        return "square" if height == width else "wide" if width > height else "tall"


def random_scene(seed: int, one_thing: float = 0.3) -> Scene:
    """The scene of a seed; `one_thing` is the chance that it holds a single object.

    Sides are 54 to 100 pixels; a third each of the pictures are square, wide and tall (up to about 1:2), so
    that families that tile by aspect ratio meet several grids.
    """
    rng = random.Random(f"scene {seed}")
    short = rng.randint(54, 72)
    long = min(100, round(short * rng.uniform(1.25, 2.0)))
    sizes = {"square": (short, short), "wide": (short, long), "tall": (long, short)}
    height, width = sizes[rng.choice(ASPECTS)]
    background = rng.choice(list(BACKGROUNDS))
    names = [(rng.choice(SHAPES), rng.choice(list(COLORS))) for _ in range(2)]
    if rng.random() < one_thing:
        center = (width / 2 + rng.uniform(-0.2, 0.2) * short, height / 2 + rng.uniform(-0.2, 0.2) * short)
        thing = Thing(*names[0], center, rng.uniform(0.2, 0.25) * short)
        return Scene((height, width), background, (thing,), None)
    relation = rng.choice(RELATIONS)
    drift = rng.uniform(-0.1, 0.1)
    things = []
    for name, place in zip(names, (0.26, 0.74), strict=True):
        along, across = place + rng.uniform(-0.02, 0.02), rng.uniform(-0.06, 0.06) * short
        if relation == "left of":
            center = (along * width, (0.5 + drift) * height + across)
        else:
            center = ((0.5 + drift) * width + across, along * height)
        things.append(Thing(*name, center, rng.uniform(0.19, 0.22) * short))
    return Scene((height, width), background, tuple(things), relation)


def draw(scene: Scene) -> Image.Image:
    """The picture, mode RGB, anti-aliased by drawing larger and reducing."""
    height, width = scene.size
    canvas = Image.new("RGB", (width * _SUPERSAMPLE, height * _SUPERSAMPLE), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        x, y, r = (v * _SUPERSAMPLE for v in (*thing.center, thing.radius))
        color = COLORS[thing.color]
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        elif thing.shape == "square":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=color)
        elif thing.shape == "triangle":
            pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=color)
        elif thing.shape == "cross":
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=color)
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=color)
        else:
            raise ValueError(f"unknown shape {thing.shape!r}")
    return canvas.reduce(_SUPERSAMPLE)


def caption(scene: Scene, language: str = "en") -> str:
    """The one true caption of a scene in a language of PROMPTS."""
    phrase = {"en": _english, "es": _spanish, "fr": _french}[language]
    return phrase(scene)


def _english(scene: Scene) -> str:
    articles = {"orange": "an"}
    nouns = [f"{articles.get(thing.color, 'a')} {thing.color} {thing.shape}" for thing in scene.things]
    return f" {scene.relation} ".join(nouns) + f" on a {scene.background} background"


_SPANISH_SHAPES = {"circle": "círculo", "square": "cuadrado", "triangle": "triángulo", "cross": "cruz"}
_SPANISH_COLORS = {  # masculine, feminine
    "red": ("rojo", "roja"),
    "green": ("verde", "verde"),
    "blue": ("azul", "azul"),
    "yellow": ("amarillo", "amarilla"),
    "purple": ("morado", "morada"),
    "orange": ("naranja", "naranja"),
}
_SPANISH_BACKGROUNDS = {"white": "blanco", "gray": "gris", "black": "negro"}
_SPANISH_RELATIONS = {"left of": "a la izquierda de", "above": "encima de"}


def _spanish(scene: Scene) -> str:
    nouns = []
    for thing in scene.things:
        feminine = thing.shape == "cross"
        color = _SPANISH_COLORS[thing.color][feminine]
        nouns.append(f"{'una' if feminine else 'un'} {_SPANISH_SHAPES[thing.shape]} {color}")
    relation = _SPANISH_RELATIONS.get(scene.relation or "", "")
    return f" {relation} ".join(nouns) + f" sobre un fondo {_SPANISH_BACKGROUNDS[scene.background]}"


_FRENCH_SHAPES = {"circle": "cercle", "square": "carré", "triangle": "triangle", "cross": "croix"}
_FRENCH_COLORS = {  # masculine, feminine
    "red": ("rouge", "rouge"),
    "green": ("vert", "verte"),
    "blue": ("bleu", "bleue"),
    "yellow": ("jaune", "jaune"),
    "purple": ("violet", "violette"),
    "orange": ("orange", "orange"),
}
_FRENCH_BACKGROUNDS = {"white": "blanc", "gray": "gris", "black": "noir"}
_FRENCH_RELATIONS = {"left of": "à gauche d'", "above": "au-dessus d'"}  # elided before "un", "une"


def _french(scene: Scene) -> str:
    nouns = []
    for thing in scene.things:
        feminine = thing.shape == "cross"
        color = _FRENCH_COLORS[thing.color][feminine]
        nouns.append(f"{'une' if feminine else 'un'} {_FRENCH_SHAPES[thing.shape]} {color}")
    relation = _FRENCH_RELATIONS.get(scene.relation or "", "")
    return f" {relation}".join(nouns) + f" sur un fond {_FRENCH_BACKGROUNDS[scene.background]}"

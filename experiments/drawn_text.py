"""Images of text for networks that detect, turn or read it, drawn with the fonts of matplotlib.

Each image has letters, ink, paper, size, blur, noise and a slight turn of its own, drawn from the
generator that is given. They are no photographs of print: their background is plain.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif"),
    *("DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
)
TEXT = """
    the of and to in is that for it was on are as with his they at be this from or had by but some
    what there we can out other were all your when up use word how said an each she which do their
    time if will way about many then them would write like these her long make thing see him two has
    look more day could go come did my sound no most number who over know water than call first
    people may down side been now find any new work part take get place made live where after back
    little only round man year came show every good give our under name very through just form much
    great think say help low line before turn cause same mean differ move right boy old too does
    tell sentence set three want air well also play small end put home read hand port large spell
    add even land here must big high such follow act why ask men change went light kind off need
    house picture try us again animal point mother world near build self earth father head stand
    own page should country found answer school grow study still learn plant cover food sun four
    invoice total amount date street telephone station exit platform receipt quantity price address
"""
WORDS = TEXT.split()
LINE_HEIGHT = 48
"""Of a line of text as the networks take it."""


def phrase(rng: np.random.Generator, words: int) -> str:
    """Words, some in capitals, some of them numbers."""
    drawn = []
    for word in rng.choice(WORDS, words):
        kind = rng.random()
        if kind < 0.15:
            word = f"{rng.integers(10 ** rng.integers(1, 6)):,}"
        elif kind < 0.25:
            word = word.upper()
        elif kind < 0.45:
            word = word.capitalize()
        drawn.append(str(word) + rng.choice(["", "", "", "", ",", ".", ":", "-"]))
    return " ".join(drawn)


def font(rng: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(str(folder / f"{rng.choice(FONTS)}.ttf"), size)


def colors(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper: dark on light, or the other way round."""
    dark, light = rng.integers(0, 110, 3).tolist(), rng.integers(150, 256, 3).tolist()
    return (tuple(dark), tuple(light)) if rng.random() < 0.8 else (tuple(light), tuple(dark))


def worn(
    image: Image.Image, paper: tuple[int, ...], turn: float, rng: np.random.Generator
) -> np.ndarray:
    """An image turned by up to so many degrees, blurred and with noise: (height, width, 3)."""
    image = image.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, fillcolor=paper)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    pixels = np.asarray(image, np.float32)
    noise = rng.uniform(0, 12) * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels + noise, 0, 255)


def normalized(pixels: np.ndarray) -> np.ndarray:
    """What the networks take: channels first, -1 to 1."""
    return ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)


def line(rng: np.random.Generator, width: int) -> np.ndarray:
    """A line of text, (3, 48, width); what it does not fill on its right is 0."""
    ink, paper = colors(rng)
    text, face = phrase(rng, int(rng.integers(1, 4))), font(rng, 32)
    left, top, right, bottom = (round(edge) for edge in face.getbbox(text))
    room = rng.integers(2, 9, 4).tolist()
    size = (right - left + room[0] + room[1], bottom - top + room[2] + room[3])
    image = Image.new("RGB", size, paper)
    ImageDraw.Draw(image).text((room[0] - left, room[2] - top), text, ink, face)
    resized = (min(width, round(size[0] * LINE_HEIGHT / size[1])), LINE_HEIGHT)
    pixels = worn(image.resize(resized, Image.Resampling.BILINEAR), paper, 1.5, rng)
    padded = np.zeros((3, LINE_HEIGHT, width), np.float32)
    padded[:, :, : resized[0]] = normalized(pixels)
    return padded


def lines(rng: np.random.Generator, count: int, width: int = 320) -> np.ndarray:
    """Lines of text, (count, 3, 48, width)."""
    return np.stack([line(rng, width) for _ in range(count)])


def turned_lines(rng: np.random.Generator, count: int) -> np.ndarray:
    """Lines of text, (count, 3, 48, 192), every other one upside down."""
    drawn = lines(rng, count, 192)
    drawn[1::2] = drawn[1::2, :, ::-1, ::-1]
    return drawn


def page(rng: np.random.Generator, size: int) -> np.ndarray:
    """A page of lines in several sizes, (3, size, size)."""
    ink, paper = colors(rng)
    image = Image.new("RGB", (size, size), paper)
    draw, top = ImageDraw.Draw(image), int(rng.integers(5, 40))
    while top < size - 20:
        height = int(rng.integers(12, 40))
        left = int(rng.integers(5, size // 3))
        draw.text((left, top), phrase(rng, int(rng.integers(1, 6))), ink, font(rng, height))
        top += int(height * rng.uniform(1.2, 2.5))
    return normalized(worn(image, paper, 4, rng))


def pages(rng: np.random.Generator, count: int, size: int = 640) -> np.ndarray:
    """Pages of text, (count, 3, size, size)."""
    return np.stack([page(rng, size) for _ in range(count)])

"""What the charts are drawn with: anti-aliased lines, boxes, text and markers, by Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#7F7F7F")
MARKERS = ("circle", "square", "triangle", "diamond", "down", "cross", "plus", "star")
_SCALE = 2  # drawn twice as large, then reduced: smooth lines
GREY, LIGHT = "#555555", "#DDDDDD"


def shape(kind: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The corners of a marker of radius r; empty for those made of lines or a circle."""
    corners = {"square": (4, 45.0), "triangle": (3, -90.0), "diamond": (4, 0.0), "down": (3, 90.0)}
    if kind == "star":
        turns = [(-90.0 + 36 * i, r * 1.4 if i % 2 == 0 else r * 0.55) for i in range(10)]
    elif kind in corners:
        count, first = corners[kind]
        turns = [(first + 360 * i / count, r * 1.3) for i in range(count)]
    else:
        return []
    return [
        (x + size * math.cos(math.radians(turn)), y + size * math.sin(math.radians(turn)))
        for turn, size in turns
    ]


class Canvas:
    """Lines, boxes, text and markers in unscaled coordinates; size: width and height."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.picture = Image.new("RGB", (_SCALE * size[0], _SCALE * size[1]), "white")
        self.draw = ImageDraw.Draw(self.picture)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(_SCALE * x, _SCALE * y) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(_SCALE * width), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.draw.rectangle([_SCALE * v for v in (left, top, right, bottom)], fill=colour)

    def text(self, x: float, y: float, text: str, size: int, anchor: str, colour: str) -> None:
        font = ImageFont.load_default(size=_SCALE * size)
        self.draw.text((_SCALE * x, _SCALE * y), text, fill=colour, font=font, anchor=anchor)

    def upright(self, x: float, y: float, text: str, size: int) -> None:
        font = ImageFont.load_default(size=_SCALE * size)
        left, top, right, bottom = (round(v) for v in font.getbbox(text))
        label = Image.new("RGB", (right - left + 8, bottom - top + 8), "white")
        ImageDraw.Draw(label).text((4 - left, 4 - top), text, fill=GREY, font=font)
        label = label.rotate(90, expand=True)
        corner = (round(_SCALE * x - label.width / 2), round(_SCALE * y - label.height / 2))
        self.picture.paste(label, corner)

    def marker(self, kind: str, x: float, y: float, colour: str, r: float = 5.0) -> None:
        corners = shape(kind, x, y, r)
        if corners:
            scaled = [(_SCALE * a, _SCALE * b) for a, b in corners]
            self.draw.polygon(scaled, fill=colour, outline="white", width=_SCALE)
        elif kind == "circle":
            box = [_SCALE * v for v in (x - r, y - r, x + r, y + r)]
            self.draw.ellipse(box, fill=colour, outline="white", width=_SCALE)
        else:
            turn = 0.0 if kind == "plus" else math.pi / 4
            for angle in (turn, turn + math.pi / 2):
                dx, dy = 1.2 * r * math.cos(angle), 1.2 * r * math.sin(angle)
                self.line([(x - dx, y - dy), (x + dx, y + dy)], colour, 2.5)

    def finished(self) -> Image.Image:
        """The picture in its size."""
        return self.picture.resize(self.size, Image.Resampling.LANCZOS)

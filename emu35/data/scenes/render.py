"""A scene as pixels."""

from PIL import Image, ImageDraw

from emu35.data.scenes.describe import BACKGROUND_RGB, RGB, Scene, outline

OVERSAMPLING = 4
"""Drawn this many times larger, then averaged: PIL's own polygons have hard edges."""


def render(scene: Scene, *, resolution: int = 96) -> Image.Image:
    """A square RGB picture, ``resolution`` pixels a side, with antialiased edges."""
    side = resolution * OVERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUND_RGB[scene.background])
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        x, y = item.centre
        points = outline(item.shape, centre=(x * side, y * side), diameter=item.diameter * side)
        draw.polygon(points, fill=RGB[item.colour])
    return image.reduce(OVERSAMPLING)

"""A picture before and after the image tokenizer."""

import torch
from PIL import Image

from emu35.vision.codec import ImageCodec
from emu35.vision.resize import to_image, to_pixels


def through(
    codec: ImageCodec, image: Image.Image, *, resolution: int
) -> tuple[Image.Image, Image.Image]:
    """``image`` at ``resolution``^2 pixels, and what is left of it once encoded and decoded."""
    pixels_3HW = to_pixels(image, area=resolution**2, factor=codec.factor)
    codes_BHW = codec.encode(torch.from_numpy(pixels_3HW)[None])
    return to_image(pixels_3HW), to_image(codec.decode(codes_BHW)[0].numpy())

"""From what an image file holds to pixels of 8 bits: depth, transparency, colour and orientation.

Pillow alone clips deep images to white, drops transparency (what is below it comes to light), and shows photos as
the sensor lay. All kinds of data go through `to_mode`, so that one file gives the same pixels everywhere.
"""

import functools
import os
import stat
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from depthfuse.errors import DataError

# The raster formats that are read, whatever a file is called. Others could start foreign programs, or be no images.
_FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"),
    *("DIB", "DDS", "ICO", "MPO", "PCX", "QOI", "SGI", "SUN", "TGA"),
)
# The formats of which Pillow gives 16 bits in mode I; those of others have no defined white.
_SIXTEEN_BITS_AS_INT32 = ("PNG", "PPM")
# Raw PNG pixels that Pillow rescales, but not the transparent value beside them.
_RESCALED = ("L;2", "L;4", "RGB;16B")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value of the second

# EXIF orientation -> what turns the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: str | IO[bytes]) -> Image.Image:
    """Pillow's lazily read image of a path or an open file; raises what Pillow raises, or OSError."""
    if isinstance(source, str) and not stat.S_ISREG(os.stat(source).st_mode):
        raise OSError("it is not a regular file")  # a pipe would make us wait for ever
    return Image.open(source, formats=_readable_formats())


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image as it is meant to be seen, with 8 bits a channel.

    16 bits (and the 12 of TIFF) are scaled to 8. What is transparent shows white. EXIF turns are carried out. Of an
    animation, or a file of several pages, this is the first. Plain 8-bit images keep their very pixels.

    Args:
        image: as Pillow opened it.
        mode: "RGB" or "L".

    Raises:
        DataError: integers or floats without a defined range, an image of which nothing is to be seen.
        OSError and others: what Pillow raises for a damaged file.
    """
    tiles = getattr(image, "tile", None)  # of a file; forgotten once it is loaded
    raw_mode = tiles[0][3] if tiles else None
    image.load()
    turn = _turn(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _eight_bits(image)
    elif image.has_transparency_data:
        if raw_mode in _RESCALED and "transparency" in image.info:
            raise DataError(
                f"a transparent colour in pixels of kind {raw_mode} is not read: convert it to RGBA"
            )
        image = _on_white(image)
    elif image.mode == "LAB":  # which Pillow converts to colours alone
        image = image.convert("RGB")
    image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Those that this Pillow knows."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    # Many photos (some of ImageNet) hold damaged EXIF, on which Pillow's parser stumbles in all ways; the pixels are
    # sound, and are taken as they are stored.
    except Exception:
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more bits, scaled so that its full range becomes 0 to 255, rounded to nearest; mode L."""
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BITS_AS_INT32):
        raise DataError(
            f"its pixels are {'floats' if image.mode == 'F' else 'integers of 32 bits or with a sign'} "
            f"(Pillow's mode {image.mode}), of which nothing says what is white: convert it to 8 or 16 bits"
        )
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, 16)
    full = 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
    pixels = (values * 255 + full // 2) // full
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow heeds for 8 bits only
        pixels = 255 - pixels
    if "transparency" in image.info:
        pixels[values == image.info["transparency"]] = 255
    return Image.fromarray(pixels.astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """An image with an alpha channel, a transparent colour or palette entries, laid on white; mode RGB."""
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[1] == 0:
        raise DataError(
            "it is fully transparent, so that nothing of it is to be seen: remove its alpha channel"
        )
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

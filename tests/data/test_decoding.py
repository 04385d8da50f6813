"""What becomes of the pixels of a file: each kind of image against values known from outside Pillow's conversions."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from depthfuse.data import DataConfig, DataError, decoding, open_data

SIZE = 8
KINDS = ["folder", "in memory", "torch/image_folder"]
RAMP = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)  # 16 bits, black to white
COLOURS = np.random.RandomState(0).randint(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture
def show(tmp_path):
    """Returns a function: (file name, its bytes) -> [S, S] or [S, S, 3] uint8, as a model is shown it."""

    def show(name: str, data: bytes, kind: str = "folder", in_chans: int = 3) -> np.ndarray:
        root = tmp_path / "images"
        for split in ("train", "val"):
            for number, cls in enumerate(("ant", "bee")):
                (root / split / cls).mkdir(parents=True, exist_ok=True)
                Image.new("L", (SIZE, SIZE)).save(root / split / cls / f"{number}.png")
        for path in (root / "val" / "ant").iterdir():
            path.unlink()
        (root / "val" / "ant" / name).write_bytes(data)
        where = {"data": kind, "data_dir": str(root)} if "/" in kind else {"data": str(root)}
        config = DataConfig(
            **where, img_size=SIZE, crop_pct=1.0, augment="none", batch_size=1, in_memory=kind == "in memory"
        )
        bundle = open_data(config, num_classes=2, in_chans=in_chans)
        images, _ = next(iter(bundle.val_loader()))
        shape = (in_chans, 1, 1)
        mean, std = (np.array(values).reshape(shape) for values in (bundle.mean, bundle.std))
        pixels = np.rint((images[0].numpy() * std + mean) * 255).astype(np.uint8)
        return pixels[0] if in_chans == 1 else pixels.transpose(1, 2, 0)

    return show


def encoded(image, format, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def tiff(values, bits, *, sample_format=1, white_is_zero=False, big_endian=False):
    """A TIFF of one strip, by hand: Pillow writes only some kinds of those that it reads."""
    order = ">" if big_endian else "<"
    pixels = (
        values.astype(values.dtype.newbyteorder(order)).tobytes()
        if isinstance(values, np.ndarray)
        else values
    )
    tags = [
        (256, SIZE), (257, SIZE), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8),
        (277, 1), (278, SIZE), (279, len(pixels)), (339, sample_format),
    ]  # fmt: skip
    data = (b"MM" if big_endian else b"II") + struct.pack(order + "HI", 42, 8 + len(pixels)) + pixels
    data += struct.pack(order + "H", len(tags))
    for tag, value in tags:
        short = tag in (258, 259, 262, 277, 339)
        kind, field = (
            (3, struct.pack(order + "HH", value, 0)) if short else (4, struct.pack(order + "I", value))
        )
        data += struct.pack(order + "HHI", tag, kind, 1) + field
    return data + bytes(4)


def to_eight_bits(values, full=65535):
    return np.rint(values.astype(np.float64) * 255 / full).astype(np.uint8)


# Depth.

SIXTEEN_BITS = {
    "png": lambda: ("a.png", encoded(Image.fromarray(RAMP), "PNG")),
    "tiff": lambda: ("a.tif", encoded(Image.fromarray(RAMP), "TIFF")),
    "packed tiff": lambda: ("a.tif", encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw")),
    "big-endian tiff": lambda: ("a.tiff", tiff(RAMP, 16, big_endian=True)),
    "pgm": lambda: ("a.pgm", f"P5 {SIZE} {SIZE} 65535\n".encode() + RAMP.astype(">u2").tobytes()),
    "jpeg 2000": lambda: ("a.jp2", encoded(Image.fromarray(RAMP), "JPEG2000", irreversible=False)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_sixteen_bits_are_scaled(show, name, in_chans, kind):
    pixels = show(*SIXTEEN_BITS[name](), kind, in_chans)
    expected = to_eight_bits(RAMP)
    assert np.array_equal(pixels, expected if in_chans == 1 else np.stack([expected] * 3, -1))
    assert len(np.unique(pixels)) == SIZE * SIZE


def test_white_of_sixteen_bits_may_be_zero(show):
    assert np.array_equal(
        show("a.tif", tiff(RAMP, 16, white_is_zero=True), in_chans=1), 255 - to_eight_bits(RAMP)
    )


def test_twelve_bits_of_tiff_and_other_maxima_of_pgm(show):
    values = (RAMP >> 4).astype(np.uint32).ravel()
    pairs = (values[::2] << 12) | values[1::2]
    packed = b"".join(int(pair).to_bytes(3, "big") for pair in pairs)
    assert np.array_equal(show("a.tif", tiff(packed, 12), in_chans=1), to_eight_bits(RAMP >> 4, 4095))
    few = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) * 10
    data = f"P5 {SIZE} {SIZE} 1000\n".encode() + few.astype(">u2").tobytes()
    difference = show("b.pgm", data, in_chans=1).astype(int) - np.rint(few * 255 / 1000)
    assert abs(difference).max() <= 1  # rounded twice


def test_sixteen_bits_of_colour(show):
    raw = np.random.RandomState(1).randint(0, 65536, (SIZE, SIZE, 3)).astype(np.uint16)
    data = f"P6 {SIZE} {SIZE} 65535\n".encode() + raw.astype(">u2").tobytes()
    assert (
        abs(show("a.ppm", data).astype(int) - to_eight_bits(raw)).max() <= 1
    )  # Pillow itself cuts to 8 bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "bits", "sample_format", "message"),
    [
        (np.int16, 16, 2, "integers of 32 bits or with a sign"),
        (np.int32, 32, 2, "integers of 32 bits or with a sign"),
        (np.uint32, 32, 1, "integers of 32 bits or with a sign"),
        (np.float32, 32, 3, "floats"),
    ],
)
def test_values_without_a_range_are_refused(show, dtype, bits, sample_format, message, kind):
    data = tiff(np.arange(SIZE * SIZE).astype(dtype), bits, sample_format=sample_format)
    with pytest.raises(DataError, match=f"cannot read image .*val/ant/a.tif: its pixels are {message}"):
        show("a.tif", data, kind)


def test_floats_of_other_formats_are_refused(show):
    data = f"Pf {SIZE} {SIZE} -1.0\n".encode() + RAMP.astype("<f4").tobytes()
    with pytest.raises(DataError, match="a.pfm: its pixels are floats"):
        show("a.pfm", data)


# Transparency.


def on_white(colours, alpha):
    """[S, S, 3] uint8 of colours over white; alpha is [S, S] uint8."""
    share = alpha[..., None] / 255
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


ALPHA = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) * 4
ALPHA[-1, -1] = 255
HALF = np.where(np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 2, 255, 0).astype(
    np.uint8
)  # each other pixel is seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "TGA"])
def test_alpha_shows_white(show, format, kind):
    image = Image.fromarray(np.concatenate([COLOURS, ALPHA[..., None]], -1))
    pixels = show(f"a.{format.lower()}", encoded(image, format), kind).astype(int)
    assert abs(pixels - on_white(COLOURS, ALPHA)).max() <= 1
    assert (pixels[0, 0] == 255).all() and (pixels[-1, -1] == COLOURS[-1, -1]).all()


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["LA", "P list", "P one", "L", "RGB", "1", "I;16", "GIF", "WEBP"])
def test_every_way_to_be_transparent(show, mode, in_chans):
    grey = COLOURS[..., 0] // 2 + 100  # never the 7 that marks transparency
    marked = np.where(HALF == 0, 7, grey).astype(np.uint8)
    name, options = "a.png", {}
    if mode == "LA":
        image = Image.fromarray(np.stack([grey, HALF], -1))
    elif mode in ("P list", "P one", "GIF"):
        image = Image.fromarray(marked)
        image.putpalette([value for value in range(256) for _ in range(3)])
        options["transparency"] = bytes([255] * 7 + [0] + [254] + [255] * 247) if mode == "P list" else 7
        name = "a.gif" if mode == "GIF" else name
    elif mode == "WEBP":
        name, options = "a.webp", {"lossless": True, "exact": True}
        image = Image.fromarray(np.stack([grey, grey, grey, HALF], -1))
    elif mode == "RGB":
        image, options = Image.fromarray(np.stack([marked] * 3, -1)), {"transparency": (7, 7, 7)}
    elif mode == "L":
        image, options = Image.fromarray(marked), {"transparency": 7}
    elif mode == "I;16":
        image, options = Image.fromarray(marked.astype(np.uint16) * 257), {"transparency": 7 * 257}
    else:
        image, options = Image.fromarray(HALF).convert("1"), {"transparency": 0}
        grey = HALF
    data = encoded(image, name[2:].upper(), **options)
    pixels = show(name, data, in_chans=in_chans)
    expected = np.where(HALF == 0, 255, grey)
    assert np.array_equal(pixels, expected if in_chans == 1 else np.stack([expected] * 3, -1))


@pytest.mark.parametrize("in_chans", ["L", "RGB"])
@pytest.mark.parametrize("mode", ["PA", "La", "RGBa"])
def test_rare_modes_with_alpha_show_white(mode, in_chans):
    grey = COLOURS[..., 0]
    image = Image.fromarray(np.stack([grey, HALF], -1))
    if mode == "PA":  # to which Pillow converts without the alpha channel
        pairs = list(zip(grey.ravel().tolist(), HALF.ravel().tolist(), strict=True))
        image = Image.new("PA", (SIZE, SIZE))
        image.putpalette([value for value in range(256) for _ in range(3)])
        image.putdata(pairs)
    else:
        image = image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)
    pixels = np.asarray(decoding.to_mode(image, in_chans))
    expected = np.where(HALF == 0, 255, grey)
    assert np.array_equal(pixels, expected if in_chans == "L" else np.stack([expected] * 3, -1))


def test_opaque_alpha_changes_nothing(show):
    opaque = np.full((SIZE, SIZE, 1), 255, np.uint8)
    image = Image.fromarray(np.concatenate([COLOURS, opaque], -1))
    assert np.array_equal(show("a.png", encoded(image, "PNG")), COLOURS)


def test_fully_transparent_image_is_refused(show):
    image = Image.fromarray(np.concatenate([COLOURS, np.zeros((SIZE, SIZE, 1), np.uint8)], -1))
    with pytest.raises(DataError, match="val/ant/a.png: it is fully transparent"):
        show("a.png", encoded(image, "PNG"))


@pytest.mark.parametrize(("bit_depth", "colour_type", "transparent"), [(16, 2, b"\0\7" * 3), (2, 0, b"\0\1")])
def test_transparent_colour_that_pillow_does_not_rescale_is_refused(
    show, bit_depth, colour_type, transparent
):
    def chunk(name, data):
        buffer = io.BytesIO()
        PngImagePlugin.putchunk(buffer, name, data)
        return buffer.getvalue()

    row = b"\0" + bytes(SIZE * bit_depth * (3 if colour_type == 2 else 1) // 8)
    data = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, bit_depth, colour_type, 0, 0, 0)
    )
    data += chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(row * SIZE)) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="a.png: a transparent colour in pixels of kind"):
        show("a.png", data)


# Orientation.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_are_carried_out(show, orientation, kind):
    image = Image.fromarray(COLOURS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    data = encoded(image, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(expected, COLOURS) == (orientation == 1)
    assert np.array_equal(show("a.png", data, kind), expected)


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "WEBP", "AVIF", "MPO"])
def test_every_format_is_turned_once(show, format):
    """A picture whose top is white, and which lies on its side in the file."""
    upright = np.zeros((SIZE, SIZE), np.uint8)
    upright[: SIZE // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    stored = Image.fromarray(np.rot90(upright).copy()).convert("RGB")
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = show(f"a.{format.lower()}", encoded(stored, format, exif=exif, **options), in_chans=1)
    assert abs(pixels[[0, 1, -2, -1]].astype(int) - upright[[0, 1, -2, -1]]).max() < 20


def test_sixteen_bits_and_transparent_images_are_turned_too(show):
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(Image.fromarray(RAMP), "PNG", exif=exif)
    assert np.array_equal(show("a.png", data, in_chans=1), to_eight_bits(RAMP)[::-1, ::-1])
    image = Image.fromarray(np.concatenate([COLOURS, HALF[..., None]], -1))
    data = encoded(image, "PNG", exif=exif)
    assert np.array_equal(show("b.png", data), show("b.png", encoded(image, "PNG"))[::-1, ::-1])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense", b"\0" * 20]
)
def test_damaged_exif_does_not_cost_the_image(show, exif):
    data = encoded(Image.fromarray(COLOURS), "JPEG", quality=95)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert np.array_equal(show("a.jpg", data[:2] + segment + data[2:]), show("a.jpg", data))


# Colour, pages, and damage.


@pytest.mark.parametrize("in_chans", [1, 3])
def test_cmyk_is_converted(show, in_chans):
    image = Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0))  # red
    pixels = show("a.tif", encoded(image, "TIFF"), in_chans=in_chans)
    assert np.array_equal(
        np.unique(pixels.reshape(-1, in_chans), axis=0), [[76] if in_chans == 1 else [255, 0, 0]]
    )
    photo = show("a.jpg", encoded(image, "JPEG", quality=100), in_chans=in_chans)
    assert abs(photo.astype(int) - pixels).max() <= 2


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["LAB", "YCbCr"])
def test_other_colour_spaces_are_converted(show, mode, in_chans):
    image = Image.new("RGB", (SIZE, SIZE), (128, 128, 128)).convert(mode)
    assert abs(show("a.tif", encoded(image, "TIFF"), in_chans=in_chans).astype(int) - 128).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_stands_for_all(show, format):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    pixels = show(f"a.{format.lower()}", data)
    assert np.array_equal(np.unique(pixels.reshape(-1, 3), axis=0), [[255, 0, 0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"", b"no image", encoded(Image.fromarray(COLOURS), "PNG")[:60]])
def test_damaged_files_are_named(show, data, kind):
    with pytest.raises(DataError, match="cannot read image .*val/ant/a.png"):
        show("a.png", data, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_absurdly_large_images_are_named(show, monkeypatch, kind):
    data = encoded(Image.new("L", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="cannot read image .*val/ant/a.png: .*exceeds limit"):
        show("a.png", data, kind)


def test_programs_in_the_guise_of_images_are_not_run(show):
    with pytest.raises(DataError, match="cannot read image .*a.jpg: cannot identify image file"):
        show("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_plain_images_keep_their_pixels(show, mode, in_chans):
    image = Image.fromarray(COLOURS).convert(mode)
    expected = np.asarray(image.convert("L" if in_chans == 1 else "RGB"))
    assert np.array_equal(show("a.png", encoded(image, "PNG"), in_chans=in_chans), expected)

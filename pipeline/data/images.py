"""Encoded images to pixels: JPEG by simplejpeg, everything else by Pillow.

Both decode JPEG by libjpeg-turbo, to the same pixels; simplejpeg skips Pillow's way through its
four-byte rows, and tells what libjpeg warns of. Pixels are uint8 [3, H, W] in channels-last order,
in which a decoder gives them and torch resizes several times as fast.
"""

import io
import re
import struct
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor

from pipeline.data.colours import UnknownWhite, to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may open. Others are rare and their readers little tested, and EPS runs a program."""
Image.init()  # all its readers are known by name from here on

MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""From twice Pillow's limit on, where it refuses, too: a small file may promise gigabytes."""

# Pillow warns of odd metadata, and near that limit, in images that are decoded all the same.
warnings.filterwarnings("ignore", module="PIL")

Size = tuple[int, int]
"""(height, width) in pixels."""


def decode_image(
    data: bytes, needed: Size | None = None, warn: Callable[[str], object] | None = None
) -> tuple[Tensor, int, int]:
    """Pixels uint8 [3, h, w] as RGB as they are stored, and the height and width of the image in
    the file.

    needed: the (height, width) to which the pixels are to be resized, if they are. A JPEG file of
    four times that or more is decoded at a half or a quarter and resized here, so that (h, w) is
    `needed`; else it is the size in the file. EXIF orientation is not applied, as COCO's boxes
    want: for training and evaluation. Raises `ValueError` for bytes that no decoder takes.

    warn: told libjpeg's words where a JPEG file that has its end is damaged before it, so that
    some of the pixels are grey or shifted.
    """
    size = _plain_jpeg_size(data)
    if size is None:
        decoded = _by_pillow(data, needed)
        if warn and data[:2] == b"\xff\xd8" and (said := _pillow_kept_silent(data)):
            warn(said)
        return decoded
    height, width = size
    if height * width > MOST_PIXELS:
        raise ValueError(f"got {width}x{height} pixels, {_FEWER}")
    scale = _reduction(size, needed) if needed else 1
    least = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
    try:
        pixels = decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except ValueError as error:
        return _beyond_warnings(data, needed, str(error), warn)
    if needed and scale > 1:
        pixels = np.array(_resized(Image.fromarray(pixels), size, scale, needed))
    return torch.from_numpy(pixels).permute(2, 0, 1), height, width


def decode_as_shown(
    data: bytes,
    needed: Callable[[Size], Size] | None = None,
    warn: Callable[[str], object] | None = None,
) -> tuple[Tensor, int, int]:
    """Pixels, height and width as in `decode_image`, of the image as a viewer shows it: turned and
    mirrored as its EXIF orientation says. For prediction alone: boxes of COCO's annotations are in
    stored pixels.

    needed: the size that an image of a size is to be resized to, both as shown. warn: as in
    `decode_image`.
    """
    with _opened(data) as image:
        width, height = image.size
        # A TIFF file is turned by Pillow itself, in `decode_image`, too.
        orientation = 1 if image.format == "TIFF" else _orientation(image)
    swapped = orientation >= 5
    shown = (width, height) if swapped else (height, width)
    wanted = needed(shown) if needed else None
    stored = wanted[::-1] if wanted and swapped else wanted
    pixels = decode_image(data, stored, warn)[0]
    if orientation == 1:
        return pixels, *shown
    turned = pixels.transpose(-1, -2) if swapped else pixels
    flipped = turned.flip(FLIPPED[orientation])
    return flipped[None].contiguous(memory_format=torch.channels_last)[0], *shown


FLIPPED: dict[int, tuple[int, ...]] = {
    2: (-1,), 3: (-2, -1), 4: (-2,), 5: (), 6: (-1,), 7: (-2, -1), 8: (-2,),
}  # fmt: skip
"""Dimensions that are mirrored for each EXIF orientation, from 5 on of the transposed image."""


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none, or it is damaged, as viewers take it."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged one trips Pillow in every way there is
        return 1
    return found if found in range(1, 9) else 1


def _beyond_warnings(
    data: bytes, needed: Size | None, said: str, warn: Callable[[str], object] | None
) -> tuple[Tensor, int, int]:
    """By Pillow, which goes on where libjpeg warned, and stops where it failed. simplejpeg, too,
    would go on if asked, but also after a failure that has a warning before it."""
    try:
        decoded = _by_pillow(data, needed)
    except ValueError:
        raise ValueError(_damaged(data, said)) from None
    if warn and _tells_damage(said, data):
        warn(said)
    return decoded


def _pillow_kept_silent(data: bytes) -> str:
    """What libjpeg warns of in a JPEG file of any channels, where it is of pixels; else nothing. At
    an eighth of the size it reads all coded data, and saves the rest."""
    try:
        decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        return str(error) if _tells_damage(str(error), data) else ""
    return ""


def _tells_damage(said: str, data: bytes) -> bool:
    """Whether libjpeg's first warning is of pixels; judged as `data_prep/checks.py` does."""
    padding = _PADDING.search(said)
    if not said.startswith(_DAMAGE) or (padding and int(padding[1]) <= _MOST_PADDING):
        return False
    try:
        decode_jpeg_header(data)
    except ValueError:  # it warned of the header, and what it could not read there it did not need
        return False
    return True


# What libjpeg warns of when it is not metadata that are odd: in the words of its jerror.h.
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file", "Inconsistent progression sequence")
_PADDING = re.compile(r"(\d+) extraneous bytes before marker 0xd[0-79]$")  # restart, end
_MOST_PADDING = 16  # bytes: webcams write 1 to 4
_BILINEAR = Image.Resampling.BILINEAR


def _reduction(size: Size, needed: Size) -> int:
    """The largest of 1, 2, 4 by which `size` can be divided and is still twice `needed`.

    From twice on, the resize that follows decides how sharp the result is, so that it differs from
    that of the whole image by less than 2 of 255 on average; at once the size it is up to 5.
    """
    ratio = min(size[0] // needed[0], size[1] // needed[1]) // 2
    return max(n for n in (1, 2, 4) if n <= max(1, ratio))


def _resized(image: Image.Image, size: Size, scale: int, needed: Size) -> Image.Image:
    """To `needed`, from an image of `size` that was decoded at one part in `scale`."""
    # The last row and column may be of fewer pixels than the others.
    return image.resize(needed[::-1], _BILINEAR, (0, 0, size[1] / scale, size[0] / scale))


def _by_pillow(data: bytes, needed: Size | None) -> tuple[Tensor, int, int]:
    with _opened(data) as opened:
        width, height = opened.size
        scale = _reduction((height, width), needed) if needed else 1
        try:
            # Only JPEG files can be drafted; for others it returns None.
            if needed and scale > 1 and opened.draft("RGB", (width // scale, height // scale)):
                image = _resized(to_rgb(opened), (height, width), scale, needed)
            else:
                image = to_rgb(opened)
        except UnknownWhite:
            raise
        except _FATAL as error:
            raise ValueError(_damaged(data, error)) from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), height, width


def _opened(data: bytes) -> Image.Image:
    """The image, of which only the header is read. Raises `ValueError` where there is none."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"got a file that {_start(data)}, expected {_WHOLE}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"got a header of more pixels, {_FEWER}") from None
    except _FATAL as error:
        raise ValueError(_damaged(data, error)) from None


_FATAL = (
    OSError, SyntaxError, ValueError, OverflowError, EOFError, LookupError, struct.error, TypeError,
    RuntimeError, MemoryError,
)  # fmt: skip
_WHOLE = f"a whole file of {', '.join(FORMATS)}"
_FEWER = (
    f"expected at most {MOST_PIXELS} in all (a decompression bomb otherwise); make the image "
    f"smaller"
)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _start(data: bytes) -> str:
    return f"starts with {data[:12]!r}" if data else "is empty"


def _damaged(data: bytes, error: BaseException | str) -> str:
    """The line for a file that a decoder gave up: the same each time for the same bytes."""
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    reason = _ADDRESS.sub("", first)
    return (
        f"got a file of {len(data)} bytes that {_start(data)} and is damaged or cut off "
        f"({reason}), expected {_WHOLE}; copy it again, or leave it out"
    )


def _plain_jpeg_size(data: bytes) -> Size | None:
    """(height, width) of a JPEG file with 8 bits in one or three channels, which both decoders
    read alike; None for another format, and for CMYK."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD9:  # without content
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            precision, channels = data[at + 4], data[at + 9]
            height = int.from_bytes(data[at + 5 : at + 7])
            width = int.from_bytes(data[at + 7 : at + 9])
            plain = precision == 8 and channels in (1, 3) and height > 0
            return (height, width) if plain else None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None

"""Encoded images to pixels: JPEG by torchvision, everything else by Pillow.

Both decode JPEG by libjpeg-turbo, to the same pixels; torchvision skips Pillow's way through its
four-byte rows. Pixels are uint8 [3, H, W] in channels-last order, in which a decoder gives them and
torch resizes several times as fast.
"""

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg


def decode_image(data: bytes, needed: tuple[int, int] | None = None) -> tuple[Tensor, int, int]:
    """Pixels uint8 [3, h, w] as RGB, and the height and width of the image in the file.

    needed: the (height, width) to which the pixels are to be resized, if they are. A JPEG file of
    four times that or more is decoded at a half or a quarter and resized here, so that (h, w) is
    `needed`; else it is the size in the file. EXIF rotation is not applied, as COCO's boxes want.
    Raises `ValueError` for bytes that no decoder takes.
    """
    size = _plain_jpeg_size(data)
    if size is None or (needed is not None and _reduction(size, needed) > 1):
        return _by_pillow(data, needed)
    try:
        # Copied, because torch does not take memory that cannot be written.
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return pixels, *pixels.shape[-2:]


_RGB, _BILINEAR = ImageReadMode.RGB, Image.Resampling.BILINEAR


def _reduction(size: tuple[int, int], needed: tuple[int, int]) -> int:
    """The largest of 1, 2, 4 by which `size` can be divided and is still twice `needed`.

    From twice on, the resize that follows decides how sharp the result is, so that it differs from
    that of the whole image by less than 2 of 255 on average; at once the size it is up to 5.
    """
    ratio = min(size[0] // needed[0], size[1] // needed[1]) // 2
    return max(n for n in (1, 2, 4) if n <= max(1, ratio))


def _by_pillow(data: bytes, needed: tuple[int, int] | None) -> tuple[Tensor, int, int]:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            scale = _reduction((height, width), needed) if needed else 1
            # Only JPEG files can be drafted; for others it returns None.
            if needed and scale > 1 and opened.draft("RGB", (width // scale, height // scale)):
                # The last row and column may be of fewer pixels than the others.
                part = (0, 0, width / scale, height / scale)
                image = opened.convert("RGB").resize(needed[::-1], _BILINEAR, part)
            else:
                image = opened.convert("RGB")
            pixels = np.array(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None
    return torch.from_numpy(pixels).permute(2, 0, 1), height, width


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG file with 8 bits in one or three channels, which both decoders
    read alike; None for another format, and for CMYK."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            precision, channels = data[at + 4], data[at + 9]
            height = int.from_bytes(data[at + 5 : at + 7])
            width = int.from_bytes(data[at + 7 : at + 9])
            plain = precision == 8 and channels in (1, 3) and height > 0
            return (height, width) if plain else None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None

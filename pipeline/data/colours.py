"""Any image that Pillow opens, as 8-bit RGB."""

import numpy as np
from PIL import Image

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
WHITE = 65535


class UnknownWhite(ValueError):
    """Nothing says which grey value is white."""


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits: grey in three channels, CMYK by (255 - C) (255 - K) / 255 and so on, a palette
    looked up, 16 bits divided by 257 and rounded.

    Transparency is dropped, not laid on a background: so do training, and what the weights come
    from. Colour profiles are not applied. Raises `UnknownWhite` for floating point, and for
    integers beyond 16 bits.
    """
    if image.mode in SIXTEEN_BITS:
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > WHITE:
            raise UnknownWhite(
                f"got grey values {low} to {high}, expected 0 to {WHITE}; scale them to 16 bits"
            )
        # Pillow's own conversion would cut at 255.
        grey = (values.astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnknownWhite(
            "got grey values in floating point, expected 8 or 16 bits; scale them so that white is "
            "255 or 65535"
        )
    if image.mode == "P":
        return image.convert("RGBA").convert("RGB")  # at once it would warn of transparency
    return image.convert("RGB")

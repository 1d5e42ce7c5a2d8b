"""What decoders raise at bytes that are no picture, sound, video or array: theirs are many, and none is documented."""

from __future__ import annotations

import struct
import tokenize
import zlib

from PIL import Image

DAMAGE: tuple[type[Exception], ...] = (
    OSError,  # pillow: truncated files, and what is no picture
    ValueError,  # damaged sizes; headers that are no text
    TypeError,  # headers of arrays, which numpy reads as Python
    SyntaxError,  # damaged chunks of PNG
    ArithmeticError,
    AttributeError,
    LookupError,
    EOFError,
    MemoryError,  # headers that claim more than there is
    RuntimeError,  # libsndfile's errors; nesting without an end
    struct.error,  # damaged Exif
    tokenize.TokenError,
    zlib.error,
    Image.DecompressionBombError,
)
"""To be caught around the call of a decoder alone, where any of them says that a file is damaged."""

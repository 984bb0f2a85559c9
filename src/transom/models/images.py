"""Pictures to tiles of pixels, and the tokens that stand for them, as in Llama 4.

A picture is shrunk without distortion onto the best grid of square tiles, padded with black and
cut; with more than one tile the whole picture follows as one more. Steps and numbers are those of
meta-llama/llama-models, models/llama4/preprocess.py and chat_format.py.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from transom.base.errors import RequestError, notice, require
from transom.base.files import refuse_pointer
from transom.config.vision_args import VisionArgs

if TYPE_CHECKING:
    from PIL import Image

# Not all that Pillow knows: it would hand EPS to Ghostscript, and rare decoders are rarely looked
# after.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Eight bits per colour, or (I;16) a known range to bring down to them; "I" and "F" could hold
# anything.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B")
MAX_PIXELS = 1 << 26  # 8192 x 8192, about 200 MB once decoded
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, eq=False)
class ImageTiles:
    """`pixels` [tiles, 3, S, S] float32 from -1 to 1, row by row, the whole picture last if there
    are several.

    `grid` is (columns, rows) of tiles, without that last one.
    """

    pixels: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class ImageTokenIds:
    """Ids of the tokens around an image's patches; `patch` itself is what image rows replace."""

    start: int
    end: int
    image: int
    patch: int
    tile_x: int
    tile_y: int


def image_tokens(grid: tuple[int, int], patches_per_tile: int, tokens: ImageTokenIds) -> list[int]:
    """The tokens of one image of `grid` (columns, rows) tiles: patches, separators, and the whole
    image last.
    """
    columns, rows = grid
    require(
        columns >= 1 and rows >= 1,
        "grid",
        grid,
        "expected one column and one row of tiles or more",
    )
    require(patches_per_tile >= 1, "patches_per_tile", patches_per_tile, "expected 1 or more")
    patches = [tokens.patch] * patches_per_tile
    line = [*([*patches, tokens.tile_x] * (columns - 1)), *patches, tokens.tile_y]
    tiles = line * rows if columns * rows > 1 else []
    return [tokens.start, *tiles, tokens.image, *patches, tokens.end]


def prepare_image(
    source: Image.Image | Path | str | bytes,
    args: VisionArgs,
    max_tiles: int = 16,
    resize_to_max_canvas: bool = False,
) -> ImageTiles:
    """Tiles of a picture, ready for `VisionEmbeddings`; what cannot be read is a `RequestError`.

    `resize_to_max_canvas` enlarges a picture as far as `max_tiles` allow; otherwise it only grows
    to one tile.
    """
    require(max_tiles >= 1, "max_tiles", max_tiles, "expected 1 or more")
    require(
        args.num_channels == 3,
        "vision_args.num_channels",
        args.num_channels,
        "valid only for pictures is 3",
    )
    image, tile = open_image(source), args.image_size
    from PIL import Image  # behind `open_image`, which says what to do where it is absent

    columns, rows = grid = choose_grid(image.size, tile, max_tiles, resize_to_max_canvas)
    canvas = Image.new("RGB", (columns * tile, rows * tile))
    size = fit(image.size, canvas.size, None if resize_to_max_canvas else tile)
    canvas.paste(image.resize(size, Image.Resampling.BILINEAR))
    tiles = (
        _pixels(canvas)
        .unflatten(2, (columns, tile))
        .unflatten(1, (rows, tile))
        .permute(1, 3, 0, 2, 4)
    )
    tiles = tiles.flatten(0, 1)
    if len(tiles) > 1:
        whole = _pixels(image.resize((tile, tile), Image.Resampling.BILINEAR))
        tiles = torch.cat((tiles, whole[None]))
    return ImageTiles(tiles.contiguous(), grid)


def choose_grid(
    size: tuple[int, int], tile: int, max_tiles: int, resize_to_max_canvas: bool = False
) -> tuple[int, int]:
    """(columns, rows) of the canvas for a picture of `size` (width, height) in pixels.

    The one that enlarges it least (most with `resize_to_max_canvas`), else the one that shrinks it
    least; among equals the smallest, which is always one alone.
    """
    width, height = size
    scales = {
        (columns, rows): min(columns * tile / width, rows * tile / height)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
    }
    enlarging = [scale for scale in scales.values() if scale >= 1]
    pick = min if enlarging and not resize_to_max_canvas else max
    best = pick(enlarging or scales.values())
    return min((grid for grid, scale in scales.items() if scale == best), key=math.prod)


def fit(size: tuple[int, int], canvas: tuple[int, int], largest: int | None) -> tuple[int, int]:
    """(width, height) of the picture on its canvas, ratio kept; above `largest` pixels a side never
    grows.
    """
    width, height = size
    right, bottom = canvas
    if largest is not None:
        right, bottom = min(max(width, largest), right), min(max(height, largest), bottom)
    # The factor first, then the product, in this order: the floor below depends on the last bit.
    across, down = right / width, bottom / height
    if across < down:
        return right, max(1, min(math.floor(height * across), bottom))
    return max(1, min(math.floor(width * down), right)), bottom


def open_image(source: Image.Image | Path | str | bytes) -> Image.Image:
    """An upright RGB copy of a picture: orientation of the camera applied, transparency laid on
    white.

    Of several frames the first is taken, which is said. Not an image, truncated, more than
    `MAX_PIXELS`, another mode than `MODES` or longer than `MAX_ASPECT_RATIO` times its width is a
    `RequestError`.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise RequestError("reading images needs Pillow: pip install pillow") from error

    stream: io.BytesIO | Path
    if isinstance(source, Image.Image):
        with _readable("image"):
            return _upright_rgb(source, "image")
    if isinstance(source, bytes):
        name, stream = f"image of {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        name, stream = str(source), Path(source).expanduser()
        if not stream.is_file():
            raise RequestError(f"{name}: no such file; expected an image file")
        refuse_pointer(stream)
    else:
        raise RequestError(
            f"image of type {type(source).__name__}: expected a PIL image, a path or bytes"
        )
    with _readable(name), Image.open(stream, formats=FORMATS) as image:
        return _upright_rgb(image, name)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises over a file into one sentence about it."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (RequestError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise RequestError(
            f"{name}: not an image that is read here; expected {', '.join(FORMATS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{name}: too large; expected at most {MAX_PIXELS} pixels") from error
    # decoders raise what they meet: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise RequestError(
            f"{name}: damaged or truncated ({error}); expected a whole image"
        ) from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    from PIL import ImageOps

    _check(image, name)
    frames = getattr(image, "n_frames", 1)  # formats with a single frame have no such attribute
    if frames > 1 and image.format != "MPO":  # a JPEG whose other frames are its preview or depth
        notice(f"{name}: {frames} frames, the first is used")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    return _on_white(image.convert("RGBA"))


def _check(image: Image.Image, name: str) -> None:
    """Refuse by the header, before a byte is decoded."""
    short, long = sorted(image.size)
    described = f"{name}: {image.width} x {image.height} pixels"
    if short < 1:
        raise RequestError(f"{described}; expected one or more each way")
    if image.width * image.height > MAX_PIXELS:
        raise RequestError(f"{described}; expected at most {MAX_PIXELS} in all")
    if long > MAX_ASPECT_RATIO * short:
        raise RequestError(
            f"{described}; expected a long side of at most {MAX_ASPECT_RATIO} times the short one"
        )
    if image.mode not in MODES:
        raise RequestError(f"{name}: mode {image.mode!r}; expected {', '.join(MODES)}")


def _eight_bits(image: Image.Image) -> Image.Image:
    """RGB of 16-bit grey, by value: Pillow's own conversion has clipped, and cut, in different
    releases.
    """
    from PIL import Image

    values = np.asarray(image).astype(np.uint16)
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 65535
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _pixels(image: Image.Image) -> Tensor:
    """[3, height, width] float32 from -1 (black) to 1."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (values.float() / 255 - 0.5) / 0.5

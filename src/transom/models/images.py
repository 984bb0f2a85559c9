"""Images to tiles of pixels, and the tokens that stand for them, as in Llama 4.

An image is resized without distortion onto the best grid of square tiles, padded with black and
cut. With more than one tile, the complete image follows as one more tile. The steps and numbers are
those of meta-llama/llama-models, models/llama4/preprocess.py and chat_format.py.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from transom.base.errors import RequestError, expect, explained, notice
from transom.base.files import refuse_pointer
from transom.config.vision_args import VisionArgs

if TYPE_CHECKING:
    from PIL import Image

DAMAGED = "got a damaged or truncated file; expected a complete image"
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
    """The tiles of one image.

    Attributes:
        pixels: float32 [tiles, 3, S, S] from -1 to 1, row by row. With several tiles the complete
            image is the last one.
        grid: (columns, rows) of tiles, without the last one.
    """

    pixels: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class ImageTokenIds:
    """The ids of the tokens around the patches of an image; rows of the encoder replace `patch`."""

    start: int
    end: int
    image: int
    patch: int
    tile_x: int
    tile_y: int


def image_tokens(grid: tuple[int, int], patches_per_tile: int, tokens: ImageTokenIds) -> list[int]:
    """Return the token ids of one image: patches, separators, and the complete image last.

    Args:
        grid: (columns, rows) of tiles.
        patches_per_tile: Patch tokens of each tile.
        tokens: The ids of the tokens.

    Raises:
        RequestError: A number is below 1.
    """
    columns, rows = grid
    expect(columns >= 1 and rows >= 1, "grid", grid, "1 column and 1 row or more")
    expect(patches_per_tile >= 1, "patches_per_tile", patches_per_tile, "1 or more")
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
    """Read an image and cut it into tiles for `VisionEmbeddings`.

    Args:
        source: An image, a file, or the content of a file.
        args: Arguments of the image encoder.
        max_tiles: Tiles of the grid at most.
        resize_to_max_canvas: Enlarge the image as far as `max_tiles` allow. By default it is
            enlarged to one tile at most.

    Raises:
        RequestError: The image can't be read.
    """
    expect(max_tiles >= 1, "max_tiles", max_tiles, "1 or more")
    channels = args.num_channels
    expect(channels == 3, "vision_args.num_channels", channels, "3 for images")
    image, tile = open_image(source), args.image_size
    from PIL import Image

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
        complete = _pixels(image.resize((tile, tile), Image.Resampling.BILINEAR))
        tiles = torch.cat((tiles, complete[None]))
    return ImageTiles(tiles.contiguous(), grid)


def choose_grid(
    size: tuple[int, int], tile: int, max_tiles: int, resize_to_max_canvas: bool = False
) -> tuple[int, int]:
    """Return (columns, rows) of the grid for an image.

    It is the grid that enlarges the image least (or most, with `resize_to_max_canvas`), or else the
    one that shrinks it least. Of equal grids the one with the fewest tiles is taken.

    Args:
        size: (width, height) of the image in pixels.
        tile: Side of a tile in pixels.
        max_tiles: Tiles at most.
        resize_to_max_canvas: As for `prepare_image`.
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
    """Return (width, height) of the image on its canvas in pixels, with the same aspect ratio.

    A side does not grow above `largest` pixels.
    """
    width, height = size
    right, bottom = canvas
    if largest is not None:
        right, bottom = min(max(width, largest), right), min(max(height, largest), bottom)
    # The factor comes before the product, since the floor below depends on the last bit.
    across, down = right / width, bottom / height
    if across < down:
        return right, max(1, min(math.floor(height * across), bottom))
    return max(1, min(math.floor(width * down), right)), bottom


def open_image(source: Image.Image | Path | str | bytes) -> Image.Image:
    """Return an image as upright RGB: rotated as its camera says, on a white background.

    Of several frames the first one is used, and a notice says so.

    Raises:
        RequestError: The source is no image or damaged, has more than `MAX_PIXELS`, a mode that is
            not in `MODES`, or a side of more than `MAX_ASPECT_RATIO` times the other.
    """
    from PIL import Image, UnidentifiedImageError

    stream: io.BytesIO | Path
    if isinstance(source, Image.Image):
        with explained(f"image: {DAMAGED}", Exception):
            return _upright_rgb(source, "image")
    if isinstance(source, bytes):
        name, stream = f"image of {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        name, stream = str(source), Path(source).expanduser()
        if not stream.is_file():
            raise RequestError(f"{name}: got no file; expected an image file")
        refuse_pointer(stream)
    else:
        found = type(source).__name__
        raise RequestError(
            f"image: got a value of type {found}; expected an image, a path or bytes"
        )
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    other = f"got a file of another format; expected an image as {', '.join(FORMATS)}"
    with (
        # Decoders raise errors of many kinds: OSError, SyntaxError, struct.error, zlib.error, ...
        explained(f"{name}: {DAMAGED}", Exception),
        explained(f"{name}: got a larger image; expected at most {MAX_PIXELS} pixels", *bombs),
        explained(f"{name}: {other}", UnidentifiedImageError),
        Image.open(stream, formats=FORMATS) as image,
    ):
        return _upright_rgb(image, name)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return the first frame of an opened image as upright RGB."""
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
    """Check the header of an image before its pixels are decoded."""
    short, long = sorted(image.size)
    size = f"{image.width} x {image.height} pixels"
    expect(short >= 1, name, size, "1 pixel or more each way")
    expect(short * long <= MAX_PIXELS, name, size, f"at most {MAX_PIXELS} pixels")
    expected = f"a long side of at most {MAX_ASPECT_RATIO} times the short one"
    expect(long <= MAX_ASPECT_RATIO * short, name, size, expected)
    mode = f"mode {image.mode}"
    expect(image.mode in MODES, name, mode, f"one of the modes {', '.join(MODES)}")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as RGB, scaled by value.

    Releases of Pillow differ in their own conversion.
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
    """Return the pixels float32 [3, height, width] from -1 (black) to 1."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (values.float() / 255 - 0.5) / 0.5

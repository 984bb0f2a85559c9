"""Image preprocessing and token layout against the published algorithm and transformers'
processor.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.llama4.processing_llama4 import Llama4Processor

from transom.base.errors import RequestError
from transom.config.vision_args import VisionArgs
from transom.models.images import (
    ImageTokenIds,
    choose_grid,
    fit,
    image_tokens,
    open_image,
    prepare_image,
)

TILE = 28
ARGS = VisionArgs(image_size=TILE, patch_size=14)
# Smaller than a tile, exact, one pixel beside exact, both orientations, more than any canvas, ratio
# 200.
SIZES = [
    (1, 1),
    (7, 20),
    (28, 28),
    (29, 28),
    (56, 28),
    (27, 85),
    (84, 84),
    (100, 61),
    (130, 400),
    (900, 500),
    (200, 1),
]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels: decoding it would fail in another way."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IEND"
    parts = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in (chunk, b"IDAT", end)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# -- the published algorithm, written again from its description (meta llama4/preprocess.py)
# ----------------


def published_canvas(
    width: int, height: int, max_tiles: int, fill: bool, tile: int = TILE
) -> tuple[int, int]:
    """In float32 and in the published order of canvases, where the first of equals wins."""
    by_ratio = defaultdict(list)
    for count in range(max_tiles, 0, -1):
        for a in range(1, count + 1):
            if count % a == 0:
                by_ratio[a / (count // a)].append((a, count // a))
    canvases = torch.tensor([pair for pairs in by_ratio.values() for pair in pairs]) * tile
    scales = (canvases / torch.tensor([width, height])).amin(1)
    enlarging = scales[scales >= 1]
    best = scales.max()
    if len(enlarging):
        best = enlarging.max() if fill else enlarging.min()
    chosen = canvases[scales == best]
    columns, rows = (chosen[chosen.prod(1).argmin()] // tile).tolist()
    return columns, rows


def published_tiles(image: Image.Image, max_tiles: int, fill: bool) -> Tensor:
    columns, rows = published_canvas(*image.size, max_tiles, fill)
    width, height = columns * TILE, rows * TILE
    if not fill:
        width, height = min(max(image.width, TILE), width), min(max(image.height, TILE), height)
    if width / image.width < height / image.height:
        size = (width, min(int(image.height * (width / image.width)), height))
    else:
        size = (min(int(image.width * (height / image.height)), width), height)
    small = np.array(image.resize((max(size[0], 1), max(size[1], 1)), Image.Resampling.BILINEAR))
    canvas = np.zeros((rows * TILE, columns * TILE, 3), np.uint8)
    canvas[: small.shape[0], : small.shape[1]] = small
    cuts = [
        canvas[y : y + TILE, x : x + TILE]
        for y in range(0, rows * TILE, TILE)
        for x in range(0, columns * TILE, TILE)
    ]
    if len(cuts) > 1:
        cuts.append(np.array(image.resize((TILE, TILE), Image.Resampling.BILINEAR)))
    tiles = torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2)
    return tiles.float().div(255).sub(0.5).div(0.5)


@pytest.mark.parametrize("fill", [False, True], ids=["shrink", "fill"])
@pytest.mark.parametrize("max_tiles", [1, 3, 16])
def test_tiles_are_the_published_ones(max_tiles, fill):
    for width, height in SIZES:
        image = picture(width, height)
        mine = prepare_image(image, ARGS, max_tiles, resize_to_max_canvas=fill)
        theirs = published_tiles(image, max_tiles, fill)
        assert mine.pixels.shape == theirs.shape, (width, height)
        assert torch.equal(mine.pixels, theirs), (width, height)


@pytest.mark.parametrize("fill", [False, True], ids=["shrink", "fill"])
def test_grids_are_the_published_ones_for_every_size(fill):
    for width in range(1, 45):
        for height in range(1, 45):
            published = published_canvas(width, height, 12, fill, tile=7)
            assert choose_grid((width, height), 7, 12, fill) == published, (width, height)


def test_tiles_are_those_of_transformers():
    """Theirs resizes tensors (one grey level off at most) and normalises in bfloat16."""
    pytest.importorskip(
        "torchvision", reason="has no CPU build beside every torch that is accepted"
    )
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    theirs = Llama4ImageProcessor(size={"height": TILE, "width": TILE}, max_patches=16)
    for width, height in SIZES:
        out = theirs(picture(width, height), return_tensors="pt")
        mine = prepare_image(picture(width, height), ARGS)
        assert tuple(out["aspect_ratios"].flatten().tolist()) == mine.grid[::-1]
        pixels = out["pixel_values"].reshape(mine.pixels.shape).float()
        torch.testing.assert_close(mine.pixels, pixels, rtol=0, atol=2 / 255 + 2**-7)


@pytest.mark.parametrize(
    ("size", "canvas", "largest", "expected"),
    [
        ((300, 200), (200, 450), None, (200, 133)),
        ((600, 800), (1300, 450), None, (337, 450)),
        ((200, 400), (1200, 1000), 600, (300, 600)),
        ((200, 2000), (1200, 1000), 600, (100, 1000)),
        ((200, 1), (28, 28), None, (28, 1)),  # a side of 0.14 pixels
    ],
)
def test_fit_of_known_sizes(size, canvas, largest, expected):
    assert fit(size, canvas, largest) == expected


def test_padding_is_black_which_is_minus_one():
    tiles = prepare_image(Image.new("RGB", (2 * TILE, TILE + 1), (255, 255, 255)), ARGS)
    assert tiles.grid == (2, 2)
    assert tiles.pixels.shape == (5, 3, TILE, TILE)
    lower = tiles.pixels[2:4]
    assert (lower[:, :, 0] == 1).all() and (lower[:, :, 1:] == -1).all()
    assert (tiles.pixels[4] == 1).all(), "the whole picture is stretched, not padded"


@pytest.mark.parametrize("kind", ["PIL", "bytes", "path", "str"])
def test_every_kind_of_source_gives_the_same_tiles(kind, tmp_path):
    image = picture(40, 30)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    source = {"PIL": image, "bytes": path.read_bytes(), "path": path, "str": str(path)}[kind]
    assert torch.equal(prepare_image(source, ARGS).pixels, prepare_image(image, ARGS).pixels)


# -- what is in the file
# -------------------------------------------------------------------------------------


def transparent(image: Image.Image, **info: object) -> Image.Image:
    image.info.update(info)
    return image


def palette(alpha: bool) -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    return transparent(image, transparency=1) if alpha else image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("LA", (4, 4), (77, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204, 204, 204)),
        (transparent(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
        (palette(alpha=False), (200, 100, 50)),
        (palette(alpha=True), (255, 255, 255)),
        (palette(alpha=True).convert("PA"), (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
        (Image.new("YCbCr", (4, 4), (128, 128, 128)), (128, 128, 128)),
        (Image.fromarray(np.full((4, 4), 25700, np.uint16)), (100, 100, 100)),
        (
            transparent(Image.fromarray(np.full((4, 4), 257, np.uint16)), transparency=257),
            (255, 255, 255),
        ),
    ],
    ids=[
        "1",
        "L",
        "LA",
        "RGBA",
        "RGB-key",
        "P",
        "P-key",
        "PA",
        "CMYK",
        "YCbCr",
        "I;16",
        "I;16-key",
    ],
)
def test_modes_become_colours_on_white(image, expected):
    opened = open_image(image)
    assert opened.mode == "RGB" and opened.size == image.size
    assert opened.getpixel((1, 1)) == expected


def test_a_16_bit_png_keeps_its_brightness():
    image = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    assert np.array_equal(np.array(open_image(encoded(image)))[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_the_orientation_of_the_camera_is_applied(orientation):
    upright = np.array(picture(3, 2))
    # As EXIF defines them: 2 is mirrored, 3 lies on its head, 6 must be turned clockwise, 8 the
    # other way.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        **{o: np.rot90(upright, k) for o, k in ((3, 2), (6, 1), (8, -1))},
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(Image.fromarray(np.ascontiguousarray(stored[orientation])), exif=exif)
    assert np.array_equal(np.array(open_image(file)), upright)


def test_of_several_frames_the_first_is_used_and_said(capsys):
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (200, 10)]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(moving).getpixel((0, 0)) == (200, 0, 0)
    assert "2 frames, the first is used" in capsys.readouterr().err


def test_a_photograph_with_its_preview_is_no_film(capsys):
    photograph = encoded(picture(8, 8), "MPO", save_all=True, append_images=[picture(4, 4)])
    assert open_image(photograph).size == (8, 8)
    assert capsys.readouterr().err == ""


REFUSED = {
    "bomb": (
        png_header(100_000, 100_000),
        r"image of \d+ bytes: got a larger image; expected at most 67108864 pixels",
    ),
    "large": (png_header(9_000, 9_000), "9000 x 9000 pixels.*expected at most 67108864"),
    "no pixels": (png_header(9, 9), "damaged or truncated"),
    "half a PNG": (encoded(picture(64, 64))[:5000], "damaged or truncated"),
    "half a JPEG": (encoded(picture(64, 64), "JPEG")[:1500], "damaged or truncated"),
    "text": (b"hello", "image of 5 bytes: got a file of another format; expected an image as AVIF"),
    "nothing": (b"", "image of 0 bytes: got a file of another format"),
    "PostScript": (encoded(picture(4, 4), "EPS"), "got a file of another format"),
    "unknown range": (Image.new("F", (4, 4)), "image: got 'mode F'"),
    "32 bits": (Image.new("I", (4, 4)), "image: got 'mode I'"),
    "empty": (Image.new("RGB", (0, 4)), "image: got '0 x 4 pixels'"),
    "a line": (
        Image.new("RGB", (1, 201)),
        "1 x 201 pixels.*expected a long side of at most 200 times",
    ),
    "a number": (7, "image: got a value of type int"),
    "no file": (Path("absent.png"), "absent.png: got no file"),
    "a folder": (str(Path(__file__).parent), "models: got no file"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_picture_is_refused_in_one_sentence(case):
    source, message = REFUSED[case]
    with pytest.raises(RequestError, match=message) as caught:
        prepare_image(source, ARGS)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF tags
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_file_cut_anywhere_or_with_wrong_bytes_is_read_or_refused(kind):
    whole = encoded(picture(24, 24), kind)
    draw = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole[: draw.integers(1, len(whole) + 1)])
        for at in draw.integers(0, len(broken), 3):
            broken[at] = draw.integers(0, 256)
        with contextlib.suppress(
            RequestError
        ):  # anything else that Pillow raises would fail the test
            assert open_image(bytes(broken)).mode == "RGB"


@pytest.mark.parametrize(
    ("field", "changes"), [("max_tiles", {"max_tiles": 0}), ("num_channels", {})]
)
def test_settings_that_fit_no_picture_are_refused(field, changes):
    args = VisionArgs(image_size=TILE, num_channels=1) if field == "num_channels" else ARGS
    with pytest.raises(RequestError, match=field):
        prepare_image(picture(4, 4), args, **changes)


# -- token layout
# --------------------------------------------------------------------------------------------

NAMES = {
    "<|image_start|>": 1,
    "<|image_end|>": 2,
    "<|image|>": 3,
    "<|patch|>": 4,
    "<|tile_x_separator|>": 5,
    "<|tile_y_separator|>": 6,
}
IDS = ImageTokenIds(start=1, end=2, image=3, patch=4, tile_x=5, tile_y=6)


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_layout_is_that_of_transformers(grid):
    columns, rows = grid
    text = Llama4Processor._prompt_split_image(None, (rows, columns), 4)
    assert image_tokens(grid, 4, IDS) == [NAMES[name] for name in re.findall(r"<\|\w+\|>", text)]


@pytest.mark.parametrize("size", [(20, 20), (80, 30)])
def test_one_patch_token_per_row_of_the_encoder(size):
    tiles = prepare_image(picture(*size), ARGS)
    tokens = image_tokens(tiles.grid, ARGS.patches_per_tile, IDS)
    assert tokens.count(IDS.patch) == len(tiles.pixels) * ARGS.patches_per_tile


@pytest.mark.parametrize(
    ("grid", "patches", "field"), [((0, 1), 4, "grid"), ((1, 1), 0, "patches_per_tile")]
)
def test_layouts_of_nothing_are_refused(grid, patches, field):
    with pytest.raises(RequestError, match=field):
        image_tokens(grid, patches, IDS)

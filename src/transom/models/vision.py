"""The image encoder, as in Llama 4: tiles of pixels to rows that replace patch tokens.

It is a Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) of the same blocks as the
language model: patches and a class token, full attention with two-dimensional rotary positions,
then a pixel shuffle (each square of neighbours becomes one row), an adapter, and a projection to
the dimension of the language model. The formulas are those of meta-llama/llama-models,
models/llama4/vision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.attention.backends import Attend, auto
from transom.attention.mask import Layout, MaskSpec
from transom.base.errors import RequestError
from transom.config.layer_args import RopeArgs
from transom.config.vision_args import VisionArgs
from transom.layers.block import TransformerBlock
from transom.layers.initial import draw_weight
from transom.layers.inputs import MaskedEmbedding
from transom.layers.linear import Linear
from transom.layers.norm import make_norm
from transom.layers.rope import base_frequencies
from transom.layers.step import Step


class VisionEmbeddings(nn.Module):
    """The image encoder: tiles of pixels to rows that replace patch tokens.

    Args:
        args: Arguments of the encoder.
        text_dim: Dimension D of the language model.

    Attributes:
        attend: The attention backend, which may be replaced at any time.
    """

    attend: Attend = staticmethod(auto)

    def __init__(self, args: VisionArgs, text_dim: int) -> None:
        super().__init__()
        self.args = args
        self.patch_embedding = Linear(args.num_channels * args.patch_size**2, args.dim)
        self.class_embedding = nn.Parameter(torch.empty(args.dim))
        self.position_embedding = nn.Parameter(torch.empty(args.patch_grid**2 + 1, args.dim))
        draw_weight(self.class_embedding)
        draw_weight(self.position_embedding)
        self.norm_pre = make_norm("layer", args.dim, args.norm_eps)
        self.layers = nn.ModuleList(TransformerBlock(layer) for layer in args.layers)
        self.norm_post = make_norm("layer", args.dim, args.norm_eps)
        self.adapter = Adapter(args.dim * args.shuffle**2, args.adapter_dim, args.output_dim)
        self.projection = Linear(args.output_dim, text_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode image tiles.

        Args:
            pixels: Normalized tiles [tiles, C, S, S].

        Returns:
            [tiles, patches_per_tile, text_dim] in the dtype of the weights.

        Raises:
            RequestError: The pixels have another shape.
        """
        args = self.args
        expected = (args.num_channels, args.image_size, args.image_size)
        if pixels.ndim != 4 or pixels.shape[1:] != expected or pixels.size(0) == 0:
            raise RequestError(
                f"pixels: got {list(pixels.shape)}; expected {['tiles', *expected]}, 1 tile or more"
            )
        x = self.patch_embedding(
            cut_patches(pixels.to(self.class_embedding.dtype), args.patch_size)
        )
        # The class token follows the patches, so that patch i has position embedding i.
        x = torch.cat((x, self.class_embedding.to(x.dtype).expand(x.size(0), 1, -1)), 1)
        x_BTD = self.norm_pre(x + self.position_embedding)
        step = self._step(x_BTD)
        for block in self.layers:
            x_BTD, _ = block(x_BTD, step)
        patches_BTD = self.norm_post(x_BTD)[:, :-1]
        return self.projection(
            self.adapter(pixel_shuffle(patches_BTD, args.patch_grid, args.shuffle))
        )

    def _step(self, x_BTD: Tensor) -> Step:
        """Build the step: every tile is a document whose patches all attend to each other."""
        tiles, count, _ = x_BTD.shape
        layer = self.args.layers[0]
        assert layer.rope is not None, "every block of the encoder rotates"
        positions_BT = torch.arange(count, device=x_BTD.device).expand(tiles, -1)
        return Step(
            positions_BT=positions_BT,
            valid_BT=None,
            rope={layer.rope: grid_table(self.args.patch_grid, layer.rope, x_BTD.device)},
            temperature={},
            masks={layer.rule: MaskSpec(layer.rule, positions_BT, layout=Layout((count,) * tiles))},
            attend=self.attend,
        )


class Adapter(nn.Module):
    """gelu(fc2(gelu(fc1 x))) without biases."""

    def __init__(self, dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., output_dim] of x [..., dim]."""
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


def cut_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut tiles [tiles, C, S, S] into patches [tiles, patches, C p p], row by row.

    Features are in the order of a flat convolution kernel.
    """
    squares = pixels.unflatten(3, (-1, patch_size)).unflatten(
        2, (-1, patch_size)
    )  # [tiles, C, row, p, column, p]
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pixel_shuffle(x_BTD: Tensor, grid: int, side: int) -> Tensor:
    """Merge squares of neighbouring patches: [B, grid^2, D] to [B, (grid / side)^2, side^2 D]."""
    rows = x_BTD.unflatten(1, (grid // side, side, grid // side, side))
    return rows.transpose(2, 3).flatten(3).flatten(1, 2)


def grid_table(
    grid: int, rope: RopeArgs, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) float32 [1, grid^2 + 1, 1, H / 2] of two-dimensional positions.

    Half of the pairs rotate by column + 1, half by row + 1. Counting starts at 1, since the class
    token, the last one, has angle 0.
    """
    freqs = base_frequencies(rope.dim // 2, rope.theta, device)
    steps = torch.arange(1, grid + 1, device=device).float()
    columns = (steps[:, None] * freqs).expand(grid, -1, -1)  # [row, column, H / 4]
    angles = torch.cat((columns, columns.transpose(0, 1)), -1).flatten(0, 1)
    angles = F.pad(angles, (0, 0, 0, 1))[None, :, None]
    return angles.cos(), angles.sin()


def check_patch_count(tokens: Tensor, patch_token_id: int, rows: int) -> None:
    """Check that a text has one patch token per row, before images are encoded.

    Raises:
        RequestError: The numbers differ.
    """
    count = int((tokens == patch_token_id).sum())
    if count != rows:
        found = f"{count} patch tokens (id {patch_token_id})"
        raise RequestError(f"tokens: got {found}; expected {rows}, one per row of the images")


def merge_images(tokens_BT: Tensor, patch_token_id: int, rows_RD: Tensor) -> MaskedEmbedding:
    """Return what `TransformerInput.image_embedding` takes: row i replaces the i-th patch token.

    Args:
        tokens_BT: Token ids [B, T]. Patch tokens are counted over the complete batch.
        patch_token_id: The id of the patch token.
        rows_RD: Rows [R, D], or [tiles, patches, D] of the encoder. Gradients flow into them.

    Raises:
        RequestError: The number of patch tokens is not that of the rows.
    """
    rows_RD = rows_RD.flatten(0, -2)
    check_patch_count(tokens_BT, patch_token_id, rows_RD.size(0))
    mask_BT = (tokens_BT == patch_token_id).to(rows_RD.device)
    blank_BTD = rows_RD.new_zeros(*mask_BT.shape, rows_RD.size(-1))
    return MaskedEmbedding(blank_BTD.masked_scatter(mask_BT.unsqueeze(-1), rows_RD), mask_BT)

"""The arguments of the image encoder. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transom.base.errors import expect
from transom.base.fields import check_bounds, describe
from transom.config.layer_args import LayerArgs, LayerRule, RopeArgs


@dataclass(frozen=True)
class VisionArgs:
    """The image encoder of early fusion, as in Llama 4: patches, blocks, pixel shuffle, adapter."""

    image_size: int = describe(336, "side of one square tile", "pixels", at_least=1)
    patch_size: int = describe(14, "side of one square patch", "pixels", at_least=1)
    num_channels: int = describe(3, "colour channels", at_least=1)
    dim: int = describe(1408, "width of the encoder", at_least=1)
    n_layers: int = describe(34, "blocks of the encoder", at_least=1)
    n_heads: int = describe(16, "attention heads of the encoder", at_least=1)
    hidden_dim: int = describe(5632, "feed-forward width of the encoder", at_least=1)
    norm_eps: float = describe(1e-5, "eps of its layer norms", above=0)
    rope_theta: float = describe(10000.0, "base of the two-dimensional rotary wavelengths", above=0)
    pixel_shuffle_ratio: float = describe(
        0.5, "side of the patch grid after the pixel shuffle / before", above=0, at_most=1
    )
    adapter_dim: int = describe(4096, "width inside the adapter", at_least=1)
    output_dim: int = describe(
        4096, "width of the adapter's output, which the projection reads", at_least=1
    )
    image_token: int | None = describe(
        None,
        "id of the token that stands for one image patch in a text; absent means unknown",
        at_least=0,
    )

    def __post_init__(self) -> None:
        def check(fits: bool, name: str, expected: str) -> None:
            expect(fits, name, getattr(self, name), expected)

        check_bounds(self)
        fits = self.image_size % self.patch_size == 0
        check(fits, "image_size", f"a multiple of patch_size = {self.patch_size}")
        fits = self.dim % (4 * self.n_heads) == 0  # rotary pairs of two axes in each head
        check(fits, "dim", f"a multiple of 4 * n_heads = {4 * self.n_heads}")
        whole = abs(self.pixel_shuffle_ratio * self.shuffle - 1) < 1e-6
        fits = whole and self.patch_grid % self.shuffle == 0
        check(
            fits,
            "pixel_shuffle_ratio",
            f"1 / a divisor of image_size / patch_size = {self.patch_grid}",
        )

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def shuffle(self) -> int:
        """Patches along one side of a square that the pixel shuffle turns into one row."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def patches_per_tile(self) -> int:
        """Rows, and so patch tokens, of one tile."""
        return (self.patch_grid // self.shuffle) ** 2

    @property
    def layers(self) -> tuple[LayerArgs, ...]:
        """The resolved arguments of every encoder block: LayerNorm, biases, full attention."""
        head_dim = self.dim // self.n_heads
        first = LayerArgs(
            index=0,
            dim=self.dim,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            head_dim=head_dim,
            hidden_dim=self.hidden_dim,
            norm_eps=self.norm_eps,
            rule=LayerRule("full"),
            rope=RopeArgs(head_dim, self.rope_theta),
            norm="layer",
            qkv_bias=True,
            out_bias=True,
            activation="gelu",
            ffn_gated=False,
            ffn_bias=True,
        )
        return tuple(replace(first, index=index) for index in range(self.n_layers))

"""One block: attention, optionally attention to a context, and feed-forward, with their norms."""

from __future__ import annotations

from torch import Tensor, nn

from transom.config.layer_args import LayerArgs
from transom.layers.attention import Attention, CrossAttention
from transom.layers.feed_forward import FeedForward
from transom.layers.latent_attention import LatentAttention
from transom.layers.moe import MoE, RouterStatistics
from transom.layers.norm import make_norm
from transom.layers.step import LayerCacheLike, Step


class TransformerBlock(nn.Module):
    """x + post(attention(pre(x))), then the same with cross-attention (if any) and feed-forward.

    `norm_placement` says which norms there are: `pre` and `post` norms, or both.
    """

    def __init__(self, layer: LayerArgs) -> None:
        super().__init__()
        self.layer = layer
        before, after = layer.norm_placement != "post", layer.norm_placement != "pre"

        def norm(wanted: bool) -> nn.Module | None:
            return make_norm(layer.norm, layer.dim, layer.norm_eps) if wanted else None

        self.attention_norm = norm(before)
        self.attention = LatentAttention(layer) if layer.mla is not None else Attention(layer)
        self.attention_post_norm = norm(after)
        crossing = layer.context_dim is not None
        self.context_norm = norm(crossing and before)
        self.cross_attention = CrossAttention(layer) if crossing else None
        self.context_post_norm = norm(crossing and after)
        self.ffn_norm = norm(before)
        self.feed_forward = MoE(layer) if layer.moe is not None else _dense(layer)
        self.ffn_post_norm = norm(after)

    def forward(
        self, x_BTD: Tensor, step: Step, cache: LayerCacheLike | None = None
    ) -> tuple[Tensor, RouterStatistics | None]:
        """Compute one block.

        Args:
            x_BTD: The residual stream [B, T, D].
            step: What the layers of this call share.
            cache: The cache of this layer, if any.

        Returns:
            The new residual stream [B, T, D] in the same dtype, and the statistics of the router if
            the feed-forward is a mixture of experts.
        """
        statistics = None
        y_BTD = self.attention(_apply(self.attention_norm, x_BTD), step, cache)
        x_BTD = x_BTD + _apply(self.attention_post_norm, y_BTD)
        if self.cross_attention is not None:
            y_BTD = self.cross_attention(_apply(self.context_norm, x_BTD), step, cache)
            x_BTD = x_BTD + _apply(self.context_post_norm, y_BTD)
        y_BTD = _apply(self.ffn_norm, x_BTD)
        if isinstance(self.feed_forward, MoE):
            y_BTD, statistics = self.feed_forward(y_BTD, step.valid_BT)
        else:
            y_BTD = self.feed_forward(y_BTD)
        return x_BTD + _apply(self.ffn_post_norm, y_BTD), statistics


def _dense(layer: LayerArgs) -> FeedForward:
    """Return the feed-forward of a block without experts."""
    return FeedForward(
        layer.dim, layer.hidden_dim, layer.activation, layer.ffn_gated, layer.ffn_bias
    )


def _apply(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Return norm(x), or x without a norm."""
    return x if norm is None else norm(x)

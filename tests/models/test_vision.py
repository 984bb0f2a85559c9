"""The image encoder against transformers' Llama 4, and its rows among the tokens of a text
model.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from transformers.models.llama4.configuration_llama4 import Llama4VisionConfig
from transformers.models.llama4.modeling_llama4 import Llama4VisionModel

from tests.helpers import random_model, random_tokens, tiny_args
from transom.attention.reference import reference
from transom.base.errors import RequestError
from transom.config.vision_args import VisionArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.models.vision import VisionEmbeddings, check_patch_count, merge_images, pixel_shuffle

TEXT_DIM, PATCH = 20, 7  # width of the text model, id of the patch token
# Grids of 6 and 8 patches a side; shuffles of 2 x 2, 4 x 4 and none; one and several pairs per axis
# and head.
SHAPES = {
    "half": {"image_size": 24, "patch_size": 4, "dim": 16, "n_heads": 2},
    "quarter": {
        "image_size": 16,
        "patch_size": 2,
        "dim": 24,
        "n_heads": 2,
        "pixel_shuffle_ratio": 0.25,
    },
    "whole": {
        "image_size": 15,
        "patch_size": 5,
        "dim": 16,
        "n_heads": 4,
        "pixel_shuffle_ratio": 1.0,
    },
}


def vision_args(shape: str = "half", **changes: object) -> VisionArgs:
    base = {
        "n_layers": 2,
        "hidden_dim": 64,
        "adapter_dim": 28,
        "output_dim": 28,
        "rope_theta": 100.0,
    }
    return VisionArgs(**{**base, **SHAPES[shape], **changes})


def random_encoder(args: VisionArgs, seed: int = 0) -> VisionEmbeddings:
    encoder = VisionEmbeddings(args, TEXT_DIM)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            draw = torch.randn(weight.shape, generator=generator) * 0.3
            weight.copy_(draw + 1.0 if "norm" in name and name.endswith("weight") else draw)
    return encoder


def random_pixels(args: VisionArgs, tiles: int = 3, seed: int = 1) -> Tensor:
    shape = (tiles, args.num_channels, args.image_size, args.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- parity with transformers
# --------------------------------------------------------------------------------

THEIR_NAMES = (
    (r"patch_embedding\.", "patch_embedding.linear."),
    ("position_embedding", "positional_embedding_vlm"),
    (r"norm_(pre|post)\.", r"layernorm_\1."),
    (r"layers\.(\d+)\.attention_norm\.", r"model.layers.\1.input_layernorm."),
    (r"layers\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"layers\.(\d+)\.attention\.w([qkvo])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"layers\.(\d+)\.feed_forward\.w_value\.", r"model.layers.\1.mlp.fc1."),
    (r"layers\.(\d+)\.feed_forward\.w_out\.", r"model.layers.\1.mlp.fc2."),
    (r"adapter\.", "vision_adapter.mlp."),
)


def their_name(name: str) -> str:
    for pattern, theirs in THEIR_NAMES:
        if re.match(pattern, name):
            return re.sub(rf"^{pattern}", theirs, name)
    return name


def transformers_twin(encoder: VisionEmbeddings) -> Llama4VisionModel:
    """Their encoder and adapter with our weights; their projection is a plain matrix."""
    args = encoder.args
    config = Llama4VisionConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_channels=args.num_channels,
        intermediate_size=args.dim
        * args.shuffle**2,  # theirs has one field for this and the blocks' width
        vision_output_dim=args.output_dim,
        image_size=args.image_size,
        patch_size=args.patch_size,
        pixel_shuffle_ratio=args.pixel_shuffle_ratio,
        projector_input_dim=args.adapter_dim,
        projector_output_dim=args.output_dim,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        attn_implementation="eager",
    )
    twin = Llama4VisionModel(config).eval()
    state = {
        their_name(name): weight
        for name, weight in encoder.state_dict().items()
        if name != "projection.weight"
    }
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_gradients_are_those_of_transformers(shape):
    args = vision_args(shape)
    args = vision_args(shape, hidden_dim=args.dim * args.shuffle**2)
    encoder, pixels = random_encoder(args), random_pixels(args).requires_grad_()
    twin = transformers_twin(encoder)
    projection = encoder.projection.weight.detach().clone().requires_grad_()
    mine, theirs = encoder(pixels), twin(pixels).last_hidden_state @ projection.T
    assert mine.shape == (3, args.patches_per_tile, TEXT_DIM)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    pull = torch.cos(torch.arange(mine.numel())).view_as(mine)
    weights = dict(encoder.named_parameters())
    their_weights = {**dict(twin.named_parameters()), "projection.weight": projection}
    my_gradients = torch.autograd.grad(mine, [pixels, *weights.values()], pull)
    their_gradients = torch.autograd.grad(
        theirs, [pixels, *(their_weights[their_name(n)] for n in weights)], pull
    )
    for name, a, b in zip(["pixels", *weights], my_gradients, their_gradients, strict=True):
        scale = b.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            a / scale, b / scale, rtol=0, atol=2e-5, msg=lambda t, name=name: f"{name}: {t}"
        )


def test_shuffled_rows_are_squares_of_neighbours():
    numbers = torch.arange(36.0).view(1, 36, 1)
    assert pixel_shuffle(numbers, 6, 2)[0, :4].tolist() == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
        [12, 13, 18, 19],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tile_does_not_depend_on_its_neighbours_nor_on_the_backend(dtype):
    args = vision_args()
    encoder, pixels = random_encoder(args).to(dtype), random_pixels(args)
    together = encoder(pixels)
    assert together.dtype is dtype
    encoder.attend = reference
    alone = torch.cat([encoder(tile[None]) for tile in pixels])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


def test_bfloat16_under_autocast_stays_near_float32():
    args = vision_args()
    encoder, pixels = random_encoder(args), random_pixels(args)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(pixels)
    full = encoder(pixels)
    assert (half.float() - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize(
    "shape",
    [(3, 24, 24), (0, 3, 24, 24), (2, 1, 24, 24), (2, 3, 24, 20)],
    ids=["no tiles axis", "none", "grey", "cut"],
)
def test_pixels_of_another_shape_are_refused(shape):
    encoder = VisionEmbeddings(vision_args(), TEXT_DIM)
    with pytest.raises(
        RequestError, match=re.escape(f"pixels: got {list(shape)}; expected ['tiles', 3, 24, 24]")
    ):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 25),
        ("patch_size", 0),
        ("dim", 20),
        ("n_heads", 3),
        ("pixel_shuffle_ratio", 0.4),
        ("pixel_shuffle_ratio", 0.25),
        ("pixel_shuffle_ratio", 0.0),
        ("pixel_shuffle_ratio", 2.0),
        ("rope_theta", 0.0),
        ("n_layers", 0),
        ("image_token", -1),
    ],
)
def test_encoders_that_cannot_be_are_refused_by_field(field, value):
    named = "dim" if field == "n_heads" else field
    with pytest.raises(RequestError, match=f"{named}: got "):
        vision_args(**{field: value})


def test_thirds_survive_being_written_in_decimals():
    args = VisionArgs(
        image_size=24, patch_size=4, dim=16, n_heads=2, pixel_shuffle_ratio=0.33333334
    )
    assert (args.shuffle, args.patches_per_tile) == (3, 4)


# -- among the tokens of a text
# ------------------------------------------------------------------------------


def multimodal(**vision: object) -> LLM:
    """A text model with a one-block encoder of 9 rows per tile."""
    return random_model(
        tiny_args(
            dim=TEXT_DIM, n_heads=2, n_kv_heads=1, vision_args=vision_args(n_layers=1, **vision)
        )
    )


def text_with_patches(rows: int, per_row: tuple[int, ...], count: int = 24) -> Tensor:
    """Random tokens with `per_row` patch tokens scattered over each row."""
    tokens = random_tokens(rows, count)
    tokens[tokens == PATCH] = PATCH + 1
    for index, patches in enumerate(per_row):
        places = torch.randperm(count, generator=torch.Generator().manual_seed(index))[:patches]
        tokens[index, places] = PATCH
    return tokens


def test_rows_replace_patch_tokens_in_order_over_the_batch():
    tokens = text_with_patches(3, (9, 0, 18))
    rows = torch.randn(3, 9, TEXT_DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    merged = merge_images(tokens, PATCH, rows)
    assert torch.equal(merged.mask, tokens == PATCH)
    assert torch.equal(merged.embedding[merged.mask], rows.flatten(0, 1))
    pull = torch.randn(merged.embedding.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(merged.embedding, rows, pull)
    assert torch.equal(gradient.flatten(0, 1), pull[merged.mask])


def test_a_model_reads_rows_as_if_they_were_its_embeddings():
    model, tokens = multimodal(), text_with_patches(2, (9, 9))
    pixels = random_pixels(model.args.vision_args, tiles=2)
    image = merge_images(tokens, PATCH, model.encode_images(pixels))
    logits = model(TransformerInput(tokens, image_embedding=image)).logits

    class ByHand(torch.nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            h, rows = by_hand(tokens).clone(), model.vision(pixels).flatten(0, 1)
            for (b, t), row in zip((tokens == PATCH).nonzero().tolist(), rows, strict=True):
                h[b, t] = row
            return h

    by_hand = model.tok_embeddings
    model.tok_embeddings = ByHand()
    assert torch.equal(logits, model(TransformerInput(tokens)).logits)


def test_the_loss_of_a_text_trains_the_encoder():
    model, tokens = multimodal(), text_with_patches(2, (9, 9))
    pixels = random_pixels(model.args.vision_args, tiles=2)
    image = merge_images(tokens, PATCH, model.encode_images(pixels))
    model(TransformerInput(tokens, image_embedding=image)).logits.logsumexp(-1).sum().backward()
    still = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    # A bias of keys adds the same to all scores of a query, which the softmax takes away again (up
    # to rounding).
    assert [name for name in still if not name.endswith("wk.bias")] == []


@pytest.mark.parametrize("patches", [0, 8, 10])
def test_a_count_that_does_not_match_is_refused_with_both_numbers(patches):
    tokens = text_with_patches(1, (patches,))
    message = rf"tokens: got {patches} patch tokens \(id 7\); expected 9"
    with pytest.raises(RequestError, match=message):
        merge_images(tokens, PATCH, torch.zeros(9, TEXT_DIM))
    with pytest.raises(RequestError, match=message):
        check_patch_count(tokens, PATCH, 9)


def test_a_text_without_images_merges_nothing():
    merged = merge_images(text_with_patches(1, (0,)), PATCH, torch.zeros(0, TEXT_DIM))
    assert not merged.mask.any() and not merged.embedding.any()


def test_a_text_model_takes_no_images():
    model, tokens = random_model(tiny_args()), text_with_patches(1, (2,))
    with pytest.raises(RequestError, match="image_embedding"):
        model(
            TransformerInput(
                tokens, image_embedding=merge_images(tokens, PATCH, torch.zeros(2, 32))
            )
        )
    with pytest.raises(RequestError, match="images"):
        model.encode_images(torch.zeros(1, 3, 24, 24))

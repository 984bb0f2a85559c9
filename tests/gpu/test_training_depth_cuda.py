"""Training depth on a CUDA device: every way to save memory or time gives the gradients of the
plain step.
"""

import pytest
import torch

from tests.helpers import TINY_VISION, random_model, random_tokens, tiny_args
from tests.training.runs import losses
from tests.training.runs import tiny_args as tiny_run
from transom.layers.inputs import TransformerInput
from transom.layers.linear import GroupedLinear
from transom.models.llm import LLM
from transom.training.loop.blocks import arrange_blocks
from transom.training.loop.setup import open_run
from transom.training.losses.cross_entropy import cross_entropy_sum, head_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODELS = {
    "dense": {},
    "window": {"sliding_window": 7},
    "mixture": {
        "moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 64, "expert_capacity": 1.0}
    },
}


def gradients(model: LLM) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens = random_tokens(2, 64).cuda()
    output = model(TransformerInput(tokens))
    cross_entropy_sum(output.logits[:, :-1], tokens[:, 1:]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["full", "every-2", "selective", "offload", "full + offload"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_and_offload_give_the_same_gradients(name, how):
    model = random_model(tiny_args(**MODELS[name])).cuda().train()
    plain = gradients(model)
    checkpointing = how.split(" + ")[0].replace("offload", "none")
    arrange_blocks(
        model, checkpointing=checkpointing, offload_min_bytes=0 if "offload" in how else None
    )
    for key, grad in gradients(model).items():
        torch.testing.assert_close(
            grad, plain[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_give_the_same_gradients(name):
    model = random_model(tiny_args(**MODELS[name])).cuda()
    plain = gradients(model)
    arrange_blocks(model, compiled=True)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(
            grad, plain[key], rtol=1e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_equals_the_loss_of_all_logits(dtype):
    model = random_model(tiny_args(vocab_size=4096)).cuda()
    hidden = torch.randn(2, 64, 32, device="cuda").requires_grad_()
    targets = torch.randint(4096, (2, 64), device="cuda")
    found = []
    for chunk in (0, 16):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = head_loss(model, hidden, targets, chunk)
        found.append((loss, *torch.autograd.grad(loss, [hidden, model.output.weight])))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for whole, chunked in zip(*found, strict=True):
        assert (whole - chunked).norm() <= tolerance * whole.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_behind_the_last_expert_change_nothing(dtype):
    """Dropped tokens are sorted behind the last group; kernels leave their results
    uninitialised.
    """
    linear = GroupedLinear(4, 64, 64).cuda().to(dtype)
    torch.nn.init.normal_(linear.weight, std=0.1)
    rows = torch.randn(40, 64, device="cuda", dtype=dtype)
    ends = torch.tensor([8, 8, 20, 32], device="cuda")
    fused, plain = linear(rows, ends)[:32].float(), linear.loop(rows[:32], ends).float()
    assert (fused - plain).norm() < (1e-4 if dtype == torch.float32 else 2e-2) * plain.norm()


@pytest.mark.parametrize(
    "change",
    ["optimizer.state_bits=8", "optimizer.in_backward=true", "compile=true", "loss_chunk=8"],
)
def test_training_learns_with(tmp_path, change):
    more = (
        ["optimizer.name=adamw", "optimizer.max_grad_norm=null"] if "in_backward" in change else []
    )
    args = tiny_run(tmp_path, "device=cuda", "dtype=bfloat16", "steps=120", change, *more)
    assert open_run(args, quiet=True).fit().bits_per_byte < 2.0
    assert len(losses(tmp_path / "run")) == 120


def test_the_image_encoder_equals_the_cpu():
    model = random_model(tiny_args(vision_args=TINY_VISION))
    pixels = torch.randn(3, 3, 8, 8)
    expected = model.encode_images(pixels)
    torch.testing.assert_close(
        model.cuda().encode_images(pixels.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3
    )

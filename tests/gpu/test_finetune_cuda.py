"""Fine-tuning on a CUDA device: adapters, 4-bit bases and objectives compute what they do on the
CPU.
"""

import copy

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from tests.training.finetune.runs import base_folder, chats, preferences, run_args, solved
from tests.training.runs import losses
from transom.layers.inputs import TransformerInput
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model
from transom.training.loop.setup import open_run
from transom.training.losses.cross_entropy import head_loss
from transom.training.losses.log_probs import adapters_off, measured_log_probs
from transom.verify.checks import run as verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 64}
KINDS = {
    "LoRA": ({}, {}, None),
    "DoRA": ({}, {"dora": True}, None),
    "experts": ({"moe_args": MOE}, {"targets": ("experts",)}, None),
    "nf4": ({}, {}, QuantizeArgs(group=32)),
    "int4 experts": ({"moe_args": MOE}, {}, QuantizeArgs(kind="int4", group=32)),
}


def gradients(model, device):
    model = copy.deepcopy(model).to(device).train()
    tokens = random_tokens(2, 32).to(device)
    hidden_BTD = model(TransformerInput(tokens[:, :-1], logits="none")).hidden_BTD
    head_loss(model, hidden_BTD, tokens[:, 1:]).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_an_adapter_are_those_of_the_cpu(kind):
    changes, lora, quantize = KINDS[kind]
    model = random_model(tiny_args(hidden_dim=64, **changes))
    if quantize is not None:
        quantize_model(model, quantize)
    apply_lora(model, LoraArgs(rank=4, **lora), quiet=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".B"):
                weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    expected, found = gradients(model, "cpu"), gradients(model, "cuda")
    assert expected and set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_reference_is_the_base():
    model, tokens = random_model(tiny_args()).cuda(), random_tokens(2, 16).cuda()
    before = measured_log_probs(model, TransformerInput(tokens), tokens)
    apply_lora(model, LoraArgs(rank=4), quiet=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora." in name:
                weight.normal_()
    with adapters_off(model):
        assert torch.equal(measured_log_probs(model, TransformerInput(tokens), tokens), before)


RUNS = {
    "packed": (chats, {}),
    "padded": (chats, {"packing": False}),
    "nf4": (chats, {"quantize": {"kind": "nf4", "group": 32, "skip": ["w_out", "output"]}}),
    "dpo": (preferences, {"objective": "dpo"}),
    "grpo": (solved, {"objective": "grpo", "group": 3, "answer_tokens": 6}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_each_kind_ends_with_finite_losses(tmp_path, run, dtype):
    rows, finetune = RUNS[run]
    base = base_folder(tmp_path / "model")
    words = ("device=cuda", f"dtype={dtype}", "data.batch_size=2")
    open_run(
        run_args(tmp_path, base, rows(tmp_path / "rows.jsonl"), *words, **finetune), quiet=True
    ).fit()
    found = losses(tmp_path / "run")
    assert len(found) == 8 and all(torch.isfinite(torch.tensor(found)))


def test_what_is_sampled_is_what_is_trained():
    findings = list(verify("policy", device="cuda"))
    assert findings and all(one.ok for one in findings)

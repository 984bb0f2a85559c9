"""LoRA steps against PEFT, packed rows against padded, a 4-bit base against a full one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved
from benchmarks.head_loss import cuda_peak_mib, resident_peak_mib, subprocess_peak_mib
from benchmarks.training_step import SHAPES, transformers_twin
from transom.config.model_args import ModelArgs
from transom.data.chat.batches import packed_batch, padded_batch
from transom.data.chat.packing import first_fit_decreasing
from transom.data.chat.turns import EncodedChat
from transom.layers.inputs import TransformerInput
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.models.llm import LLM
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model
from transom.training.losses.cross_entropy import head_loss
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer

RANK, BATCH, LENGTH = 16, 2, 512
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 200  # of the run that compares a 4-bit base with a full one
ROWS, LONGEST = 64, 512


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return rows of step time and memory, tokens per second, and loss on a 4-bit base."""
    return [_step(device), _packing(device), _quantized(device)]


# -- one step
# ----------------------------------------------------------------------------------------


def _step(device: torch.device) -> dict[str, Any]:
    cases = {name: _stepper(name, device) for name in ("ours", "peer")}
    seconds = interleaved(cases, device, rounds=7)
    if device.type == "cuda":
        mib = {name: cuda_peak_mib(call) for name, call in cases.items()}
    else:
        del cases
        mib = {name: subprocess_peak_mib("benchmarks.finetune", name) for name in seconds}
    return {
        "benchmark": "fine-tuning",
        "case": f"LoRA step, 110m, rank {RANK} on all linears, {BATCH} x {LENGTH}, "
        f"{_dtype(device)}",
        "peer": "peft on transformers' Llama, eager, fused AdamW in both",
        "seconds": round(seconds["ours"], 3),
        "peer_seconds": round(seconds["peer"], 3),
        "ratio": round(seconds["peer"] / seconds["ours"], 3),
        "mib": mib["ours"],
        "peer_mib": mib["peer"],
        "memory_share": round(mib["ours"] / mib["peer"], 2),
        "memory": "peak of a step above the model, adapter and optimizer",
        "target": "ratio at least 1.0, memory_share at most 0.9",
    }


def _dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def _stepper(
    name: str, device: torch.device, batch: int = BATCH, length: int = LENGTH
) -> Callable[[], None]:
    """Return one training step of ours or of the peer, on the same tokens."""
    args = ModelArgs.from_dict({**SHAPES["110m"], "rope_layout": "halves"})
    tokens = torch.randint(args.vocab_size, (batch, length + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    if name == "ours":
        model = _with_adapter(args, device)
        optimizers = build_optimizer(model, OptimizerArgs(), device_type=device.type)

        def our_step() -> None:
            with half:
                hidden_BTD = model(TransformerInput(inputs, logits="none")).hidden_BTD
                loss = head_loss(model, hidden_BTD, targets)
            (loss / targets.numel()).backward()
            optimizers.step()
            optimizers.zero_grad()

        return our_step
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        transformers_twin(args), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    ).to(device)
    adamw = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=3e-4, fused=True
    )

    def their_step() -> None:
        with half:
            loss = F.cross_entropy(
                theirs(input_ids=inputs).logits.flatten(0, 1).float(), targets.flatten()
            )
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    return their_step


def _with_adapter(
    args: ModelArgs, device: torch.device, quantize: QuantizeArgs | None = None
) -> LLM:
    model = LLM(args)
    model.init_weights()
    with torch.no_grad():  # blocks begin as the identity; those of a trained model do not
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not weight.any():
                weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    model.to(device)
    if quantize is not None:
        quantize_model(model, quantize)
    return apply_lora(model, LoraArgs(rank=RANK, alpha=2.0 * RANK), quiet=True)


# -- packing
# -----------------------------------------------------------------------------------------


def _packing(device: torch.device) -> dict[str, Any]:
    args = ModelArgs.from_dict({**SHAPES["10m"], "max_seq_len": LONGEST})
    generator = torch.Generator().manual_seed(0)
    # Chats are short with a long tail: most of what such rows are padded to is padding.
    sizes = (LONGEST * torch.rand(ROWS, generator=generator) ** 3).int().clamp(min=16).tolist()
    examples = [
        EncodedChat(
            str(at),
            torch.randint(args.vocab_size, (size + 1,), generator=generator).int().numpy(),
            _ones(size),
        )
        for at, size in enumerate(sizes)
    ]
    packs = [[examples[at] for at in pack] for pack in first_fit_decreasing(sizes, LONGEST, 0)]
    # Batches of rows as they come, as a loader that neither packs nor sorts makes them.
    padded = [padded_batch([(row,) for row in examples[at : at + 8]]) for at in range(0, ROWS, 8)]
    packed = [packed_batch(packs[at : at + 4]) for at in range(0, len(packs), 4)]
    model = _with_adapter(args, device)

    def run(batches: list[Any]) -> None:
        for batch in batches:
            here = batch.to(device)
            hidden_BTD = model(here.inputs()).hidden_BTD
            head_loss(model, hidden_BTD, here.targets, None, here.weights).backward()
            model.zero_grad()

    seconds = interleaved(
        {"packed": lambda: run(packed), "padded": lambda: run(padded)}, device, rounds=5
    )
    useful = sum(sizes)
    cells = sum(batch.tokens.numel() for batch in padded)
    return {
        "benchmark": "fine-tuning",
        "case": f"{ROWS} examples of {min(sizes)} to {max(sizes)} tokens, packed",
        "padding": f"{1 - useful / cells:.0%} of the peer's tokens",
        "peer": "the same rows, padded in the order they come",
        "tokens_per_second": round(useful / seconds["packed"], 1),
        "peer_tokens_per_second": round(useful / seconds["padded"], 1),
        "ratio": round(seconds["padded"] / seconds["packed"], 2),
        "target": "ratio at least 1.5",
    }


def _ones(size: int) -> Any:
    import numpy as np

    weights = np.ones(size + 1, np.float32)
    weights[0] = 0.0
    return weights


# -- 4-bit base
# --------------------------------------------------------------------------------------


def _quantized(device: torch.device) -> dict[str, Any]:
    """Compare the loss after some steps on repeated text, with a float32 and an nf4 base."""
    args = ModelArgs.from_dict({**SHAPES["10m"], "max_seq_len": 128, "vocab_size": 512})
    losses = {}
    for name, quantize in (("float32", None), ("nf4", QuantizeArgs(group=32))):
        torch.manual_seed(0)
        model = _with_adapter(args, device, quantize)
        optimizers = build_optimizer(
            model, OptimizerArgs(lr=2e-3, weight_decay=0.0), device_type=device.type
        )
        generator = torch.Generator().manual_seed(1)
        recent = []
        for _ in range(STEPS):
            tokens = _phrases(generator, args.vocab_size).to(device)
            hidden_BTD = model(TransformerInput(tokens[:, :-1], logits="none")).hidden_BTD
            loss = head_loss(model, hidden_BTD, tokens[:, 1:]) / tokens[:, 1:].numel()
            loss.backward()
            optimizers.step()
            optimizers.zero_grad()
            recent.append(float(loss.detach()))
        losses[name] = sum(recent[-20:]) / 20
    return {
        "benchmark": "fine-tuning",
        "case": f"loss after {STEPS} LoRA steps on an nf4 base, groups of 32, 10m",
        "peer": "the same run on the base in float32",
        "loss": round(losses["nf4"], 4),
        "peer_loss": round(losses["float32"], 4),
        "ratio": round(losses["nf4"] / losses["float32"], 4),
        "target": "ratio at most 1.02",
    }


def _phrases(generator: torch.Generator, vocab_size: int) -> torch.Tensor:
    """Return rows [8, 65] that step through the vocabulary by a random stride per row."""
    start = torch.randint(vocab_size, (8, 1), generator=generator)
    stride = torch.randint(1, 5, (8, 1), generator=generator)
    return (start + stride * torch.arange(65)) % vocab_size


if __name__ == "__main__":
    cpu = torch.device("cpu")
    small = _stepper(sys.argv[1], cpu, 1, 16)
    small()  # what the first call allocates for good
    del small
    step = _stepper(sys.argv[1], cpu)
    print(json.dumps(resident_peak_mib(step)))

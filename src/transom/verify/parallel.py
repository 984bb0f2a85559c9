"""Training steps on several ranks against the same steps in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom.config.model_args import ModelArgs
from transom.config.parallel_args import ParallelArgs
from transom.data.batch import NO_TARGET, Batch
from transom.data.order import Batches
from transom.distributed.mesh import Meshes
from transom.distributed.parallelize import parallelize
from transom.distributed.parts import full_tensor
from transom.distributed.ranks import ALONE, Ranks
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.models.llm import LLM
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model
from transom.training.config import read_config
from transom.training.loop.run_data import RunData
from transom.training.loop.run_folder import RunFolder
from transom.training.loop.run_parts import RunParts
from transom.training.loop.step import Stepper
from transom.training.losses.objectives import NextToken
from transom.verify.findings import Finding, difference
from transom.verify.forked_ranks import run_ranks
from transom.verify.sample_models import VOCABULARY, sample_model
from transom.verify.tiny_runs import quiet, temporary_folder

RANKS, ROWS, LENGTH, STEPS = 4, 8, 16, 2
# Of losses and of gradients. A mean of means differs by 1e-2, a missing term by more.
TOLERANCES = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-4, 1e-4)}
DENSE = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64}
SIZES: dict[str, Any] = {**DENSE, "vocab_size": VOCABULARY, "max_seq_len": 64}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
EXPERTS = {"num_experts": 4, "top_k": 2, "hidden_dim": 32, "balance_scope": "sequence"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "tied": {**SIZES, "tie_embeddings": True, "qk_norm": "head", "attn_sinks": True},
    "windowed": {**SIZES, "sliding_window": 5, "layer_pattern": "SF"},
    "latent": {**SIZES, "n_kv_heads": 4, "mla_args": {**MLA, "v_head_dim": 8}},
    "experts": {**SIZES, "moe_args": {**EXPERTS, "aux_loss_coef": 0.1, "z_loss_coef": 0.01}},
}
FEW = ("llama", "experts")
# Models with an adapter, and how their frozen weights are quantized.
TUNED: dict[str, tuple[str, QuantizeArgs | None]] = {
    "LoRA": ("llama", None),
    "LoRA on experts": ("experts", None),
    "LoRA on NF4": ("llama", QuantizeArgs("nf4", group=32)),
}
RING = {"context_ring": True}
# Gradients of the second step show whether the first one has moved all weights alike.
MUON = {"optimizer": {"name": "muon", "muon_lr": 0.1, "max_grad_norm": None}}
FOUR = {"accumulate": 4}


@dataclass(frozen=True)
class RankCase:
    """One way to share a step.

    Attributes:
        name: Its name.
        degrees: The fields of `ParallelArgs`.
        models: The models that are compared.
        run: Fields of the run's config.
        dtype: Dtype of the weights and products.
    """

    name: str
    degrees: Mapping[str, Any]
    models: Sequence[str] = tuple(MODELS)
    run: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


LAYOUTS = (
    RankCase("replicated", {"replicate": 4, "shard": 1}),
    RankCase("replicated, 2 micro-batches", {"replicate": 4, "shard": 1}, run={"accumulate": 2}),
    RankCase("FSDP", {"shard": 4}),
    RankCase("FSDP, 2 micro-batches", {"shard": 4}, run={"accumulate": 2}),
    RankCase("FSDP, float32", {"shard": 4}, FEW, dtype=torch.float32),
    RankCase("FSDP, checkpointing", {"shard": 4}, FEW, {"activation_checkpoint": "full"}),
    RankCase("hybrid FSDP", {"replicate": 2, "shard": 2}),
    RankCase("tensor", {"tensor": 2, "replicate": 2, "shard": 1}),
    RankCase("tensor, float32", {"tensor": 2, "shard": 2}, FEW, dtype=torch.float32),
    RankCase("FSDP x tensor", {"shard": 2, "tensor": 2}),
    RankCase("context", {"context": 4}),
    RankCase("FSDP x context", {"shard": 2, "context": 2}),
    RankCase("context, ring", {"context": 4, **RING}, FEW),
    RankCase("FSDP x context, ring", {"shard": 2, "context": 2, **RING}, FEW),
    RankCase("context x tensor", {"context": 2, "tensor": 2}),
    RankCase("FSDP x tensor, Muon", {"shard": 2, "tensor": 2}, FEW, MUON),
    RankCase("FSDP x expert, Muon", {"shard": 4, "expert": 2}, ("experts",), MUON),
    RankCase("expert", {"shard": 4, "expert": 4}, ("experts",)),
    RankCase("FSDP x expert", {"shard": 4, "expert": 2}, ("experts",)),
    RankCase("context x expert", {"shard": 2, "context": 2, "expert": 4}, ("experts",)),
    RankCase("FSDP, adapters", {"shard": 4}, tuple(TUNED)),
    RankCase("FSDP x tensor, adapters", {"shard": 2, "tensor": 2}, tuple(TUNED)),
    RankCase("FSDP x context, adapters", {"shard": 2, "context": 2}, tuple(TUNED)),
    RankCase("FSDP x expert, adapters", {"shard": 4, "expert": 2}, ("LoRA on experts",)),
    RankCase("pipeline x FSDP, adapters", {"pipeline": 2, "shard": 2}, tuple(TUNED), FOUR),
    RankCase("pipeline", {"pipeline": 4}, run={"accumulate": 8}),
    RankCase("pipeline, GPipe", {"pipeline": 4}, FEW, {"accumulate": 2}),
    RankCase("pipeline x replicated", {"pipeline": 2, "replicate": 2, "shard": 1}, run=FOUR),
    RankCase("pipeline x FSDP", {"pipeline": 2, "shard": 2}, run=FOUR),
    RankCase("pipeline x FSDP, float32", {"pipeline": 2, "shard": 2}, FEW, FOUR, torch.float32),
    RankCase("pipeline x tensor", {"pipeline": 2, "tensor": 2}, run=FOUR),
    RankCase("pipeline x context", {"pipeline": 2, "context": 2}, FEW, FOUR),
    RankCase("pipeline x expert", {"pipeline": 2, "shard": 2, "expert": 2}, ("experts",), FOUR),
)


@quiet()
def check() -> Iterator[Finding]:
    """Compare losses, gradients and gradient norms of two steps in every layout.

    Four processes communicate through gloo on this machine. Rows have different numbers of targets,
    so a mean of the means of ranks would differ.
    """
    for layout in LAYOUTS:
        limits = dict(zip(("loss", "gradient"), TOLERANCES[layout.dtype], strict=True))
        shares = shares_of(layout)
        for model in layout.models:
            for kind, limit in limits.items():
                found = [one for share in shares for one in share if one["case"] == (model + kind)]
                worst = max(found, key=lambda one: one["error"])
                case = f"{layout.name}, {model}, {kind}"
                yield Finding("ranks = one process", case, worst["error"], limit, worst["place"])


def shares_of(layout: RankCase) -> list[list[dict[str, Any]]]:
    """Return what each rank found.

    Raises:
        WorkError: If a rank fails or does not finish.
    """
    with temporary_folder() as folder:
        run_ranks(_rank, RANKS, folder, folder, layout)
        return [json.loads((folder / str(rank)).read_text()) for rank in range(RANKS)]


def _rank(rank: int, folder: Path, layout: RankCase) -> None:
    """Write what one rank finds, in a process of its own."""
    meshes = Meshes.make(ParallelArgs(**layout.degrees), "cpu")
    ranks = Ranks(rank, RANKS, torch.device("cpu"), meshes)
    found = [one for model in layout.models for one in _compare(layout, model, ranks)]
    (folder / str(rank)).write_text(json.dumps(found))


def _compare(layout: RankCase, name: str, ranks: Ranks) -> list[dict[str, Any]]:
    """Return the errors of this rank's losses and gradients, by case."""
    alone = _steps(layout, name, ALONE)
    found = []
    for step, (own, expected) in enumerate(zip(_steps(layout, name, ranks), alone, strict=True)):
        for key, value in own.items():
            kind = "loss" if key in ("loss", "aux_loss", "z_loss") else "gradient"
            error = difference(value, expected[key])
            place = f"{key} in step {step + 1}"
            found.append({"case": name + kind, "error": error, "place": place})
    return found


class _Recorder(Stepper):
    """Takes steps and keeps their gradients before clipping."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gradients: dict[str, Tensor] = {}

    def _reduced_norm(self) -> Tensor:
        norm = super()._reduced_norm()
        self.gradients = {
            path: full_tensor(weight.grad).clone()
            for path, weight in self.model.named_parameters()
            if weight.grad is not None
        }
        return norm


def _steps(layout: RankCase, name: str, ranks: Ranks) -> list[dict[str, Tensor]]:
    """Return losses, the gradient norm and all gradients of two steps."""
    args = read_config(None, base={**_RUN, **layout.run})
    model = _model(name, layout.dtype)
    if ranks.meshes is not None:
        parallelize(model, ranks.meshes)
    batches = _Rows(1000, ROWS, ranks.row_rank, ranks.row_ranks)
    if "context_ring" in layout.degrees:
        batches.documents = ((LENGTH,),)
    data = RunData(batches, {}, ROWS)
    parts: Any = RunParts(model, None, data, NextToken(model), None)  # type: ignore[arg-type]
    stepper = _Recorder(args, parts, RunFolder("verify"), ranks, torch.float32)
    results = []
    for _ in range(STEPS):
        result = stepper.step()
        numbers = {"loss": result.loss, "gradient norm": result.grad_norm, **result.parts}
        tensors = {key: torch.tensor(value, dtype=layout.dtype) for key, value in numbers.items()}
        results.append({**tensors, **stepper.gradients})
    return results


def _model(name: str, dtype: torch.dtype) -> LLM:
    """Return one of `MODELS`, or one with an adapter that changes its outputs."""
    base, quantize = TUNED.get(name, (name, None))
    model = sample_model(ModelArgs.from_dict(MODELS[base]), dtype=dtype).train()
    if name in TUNED:
        if quantize is not None:
            quantize_model(model, quantize, tell=lambda line: None)
        apply_lora(model, LoraArgs(rank=4), quiet=True)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


_RUN: dict[str, Any] = {
    "data": {"seq_len": LENGTH, "batch_size": ROWS},
    "model": {"dim": 8, "n_layers": 1, "n_heads": 1, "vocab_size": VOCABULARY, "max_seq_len": 64},
    "device": "cpu",
    "dtype": "float32",
    "optimizer": {"name": "adamw", "max_grad_norm": None},
}


class _Rows(Batches):
    """Rows of random tokens in documents, each with another number of targets."""

    documents: Sequence[tuple[int, ...]] = ((5, 11), (16,), (3, 3, 10), (8, 8))

    def _load(self, places: Sequence[tuple[int, int]]) -> Batch:
        rows = []
        for _, item in places:
            generator = torch.Generator().manual_seed(item)
            rows.append(torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator))
        window_BT = torch.stack(rows)
        targets_BT = window_BT[:, 1:].clone()
        for row, (_, item) in enumerate(places):
            targets_BT[row, : 3 * (item % 5)] = NO_TARGET
        sizes = tuple(self.documents[item % len(self.documents)] for _, item in places)
        return Batch(window_BT[:, :-1].clone(), targets_BT, sizes=sizes)

    def largest(self, micro_batches: int) -> Batch:
        return next(self._load(self._places()).micro_batches(micro_batches))

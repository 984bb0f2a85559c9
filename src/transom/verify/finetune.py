"""Fine-tuning: rows carry loss where the assistant speaks, adapters get the gradient of the weight
they stand for, nothing else moves, a stopped run goes on as if it had not been, and without its
adapter the model is its base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from transom.base.errors import notice, require
from transom.chat.template import ChatTemplate
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.config.model_args import ModelArgs
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.batches import packed_batch, padded_batch
from transom.data.chat.conversations import ChatExample
from transom.data.chat.finetune_sets import read_examples
from transom.data.chat.rows import template_for
from transom.layers.inputs import TransformerOutput
from transom.lora.adapters import adapted_modules
from transom.lora.args import ROLES, LoraArgs
from transom.lora.weights import LoraWeights
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer
from transom.training.config import TrainArgs, read_config
from transom.training.finetune.args import FinetuneArgs
from transom.training.finetune.weights import choose_weights
from transom.training.loop.run_parts import whole_model
from transom.training.losses.balance import mixtures
from transom.training.losses.log_probs import adapters_off
from transom.training.losses.objectives import NextToken
from transom.training.losses.preferences import Preference
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer
from transom.verify.findings import TOLERANCES, Finding, difference
from transom.verify.finetune_rows import (
    PAIRS,
    TALKS,
    Writer,
    built_in_writers,
    compare_losses,
    compare_masks,
    examples_of,
)
from transom.verify.resume import compare_resumed, history
from transom.verify.sample_models import SAMPLES, sample_model
from transom.verify.targets import has_weights, small_models
from transom.verify.tiny_runs import documents, in_folder, quiet, temporary_corpus

MOST_EXAMPLES, LOSS_ROWS = 1000, 8  # of a file: looked at, and put through the model of a folder
RANK, ALPHA = 4, 6.0
STEPS, SEQ_LEN, DROPOUT = 4, 160, 0.2  # of a run that is stopped
BETA = 0.3  # of the DPO loss that is compared
# Windows and chunks without experts; experts with biases; latents, groups, shared experts, biases
# that balance.
_LATENT, _ROOM = (
    SAMPLES["deepseek"],
    {"max_seq_len": 1024},
)  # for a packed row that is taken for one text
MODELS: dict[str, dict[str, Any]] = {
    "mixed": {**SAMPLES["mixed"], **_ROOM},
    "gpt-oss": {**SAMPLES["gpt-oss"], **_ROOM},
    "deepseek": {**_LATENT, **_ROOM, "moe_args": {**_LATENT["moe_args"], "balance": "bias"}},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"scaling": "rslora"},
    "DoRA": {"dora": True},
}
# Which role a matrix of a block has, by its name alone.
PLACES = {
    "attention": r"\.attention\.",
    "ffn": r"\.feed_forward\.(shared_expert\.)?w_",
    "experts": r"\.feed_forward\.experts\.",
    "shared_experts": r"\.feed_forward\.shared_expert\.",
    "all-linear": r"\.(attention|feed_forward)\.(?!router)",
}


def check(model: str | None = None, *, data: str | None = None) -> Iterator[Finding]:
    """Compare the texts and weights of a folder and a small copy of its model, or samples.

    Args:
        model: The name of a model, see `targets.model_args`.
        data: A file with rows for the model of a folder; built-in rows without it.

    Raises:
        RequestError: If there is `data` for a model without a tokenizer.
    """
    if model is None:
        for writer in built_in_writers():
            for rows, name in ((TALKS, "conversation"), (PAIRS, "pair")):
                examples = examples_of(rows, name)
                bare = [one for one in examples if writer.template is not None or one.bare]
                yield from compare_masks(bare, writer)
    elif has_weights(model):
        yield from compare_folder(model, data)
    else:
        expected = f"valid only with a model folder, and {model} has no tokenizer"
        require(data is None, "--data", data, expected)
    small = {name: ModelArgs.from_dict(fields) for name, fields in MODELS.items()}
    if model is not None:
        small = dict(small_models(model, ()))
    with temporary_corpus() as folder:
        name = "deepseek" if model is None else model
        yield from compare_runs(small[name], folder, name)
    for name, args in small.items():
        yield from compare_shape(args, name)


def compare_folder(name: str, data: str | None = None) -> Iterator[Finding]:
    """A model's own tokenizer, chat template and weights, on the rows of `data` or on built-in
    ones.
    """
    folder = whole_model(name)
    head = read_args(folder).head
    require(head is None, "head", head, "expected a language model")
    tokenizer = load_tokenizer(folder)
    model = load(folder, dtype="float32")
    examples = examples_of(TALKS, "conversation") if data is None else [*read_examples(data)]
    if len(examples) > MOST_EXAMPLES:
        notice(f"{data}: the first {MOST_EXAMPLES:,} of {len(examples):,} examples are looked at")
        examples = examples[:MOST_EXAMPLES]
    template = template_for(examples, tokenizer, ChatTemplate.find(folder, tokenizer))
    writer = Writer(name, tokenizer, template, model.args.max_seq_len + 1)
    yield from compare_masks(examples, writer)
    alone = [one for one in examples if one.kind in ("chat", "completion", "text")]
    encoded = writer.encode(alone, [])
    if not encoded.items:
        notice(
            f"{name}: losses are compared of conversations, completions and texts; {data} has "
            f"none that fits"
        )
        return
    shortest = sorted(encoded.items, key=lambda item: len(item[0].ids))[:LOSS_ROWS]
    yield from compare_losses(model, replace(encoded, items=shortest), name)


def compare_shape(args: ModelArgs, name: str) -> Iterator[Finding]:
    """A model of drawn weights over bytes: losses, what trains and what does not, gradients, the
    reference.
    """
    tokenizer = byte_tokenizer()
    args = replace(args, vocab_size=tokenizer.vocab_size)
    with quiet():
        talks, pairs = examples_of(TALKS, "conversation"), examples_of(PAIRS, "pair")
        writer = Writer(name, tokenizer, template_for(talks, tokenizer, None), args.max_seq_len + 1)
        encoded, paired = writer.encode(talks), writer.encode(pairs)
    yield from compare_losses(sample_model(args, dtype=torch.float32), encoded, name)
    rows = [ChatExample(file, "text", text=text) for file, text in documents().items()]
    # Every token of a document is a target, so no expert is met by tokens alone that nothing is
    # learnt from.
    everything = packed_batch([[row for (row,) in writer.encode(rows).items]])
    yield from compare_coverage(args, everything, name)
    batch = packed_batch([[row for (row,) in encoded.items]])
    for kind, lora in ADAPTERS.items():
        yield from compare_gradients(args, lora, batch, f"{name}, {kind}")
    yield from compare_reference(args, padded_batch(paired.items), name)


def with_adapter(args: ModelArgs, dtype: torch.dtype, **lora: Any) -> LLM:
    """A drawn model with an adapter that says something, ready to be trained as a run makes it."""
    model = sample_model(args, dtype=dtype)
    finetune = FinetuneArgs(lora=LoraArgs.from_dict({"rank": RANK, "alpha": ALPHA, **lora}))
    choose_weights(model, finetune, 0, new_tokens=False)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if ".lora." in key:
                weight.add_(0.1 * torch.randn(weight.shape, generator=draws))
    return model


def learnt(model: LLM, batch: Batch) -> TransformerOutput:
    """Gradients of one step's loss, as the trainer makes them; returns the forward."""
    objective = NextToken(model)
    output: TransformerOutput = model(replace(batch.inputs(), logits="none"))
    objective.loss(output, batch, objective.units(batch))["loss"].backward()
    return output


# -- what trains
# ------------------------------------------------------------------------------------------


def compare_coverage(args: ModelArgs, batch: Batch, name: str) -> Iterator[Finding]:
    """For every role that the model has: its matrices and no others have adapters, which learn, and
    alone move.
    """
    shapes = {key: weight.ndim for key, weight in sample_model(args).named_parameters()}
    blocks = [
        key.removesuffix(".weight")
        for key, ndim in shapes.items()
        if ndim > 1 and key.endswith(".weight")
    ]
    for role in reversed(ROLES):  # all-linear first, which refuses nothing
        wanted = {
            path
            for path in blocks
            if path.startswith("layers.") and re.search(PLACES[role], f"{path}.")
        }
        if wanted:
            yield from _compare_role(args, batch, role, wanted, f"{name}, {role}")


def _compare_role(
    args: ModelArgs, batch: Batch, role: str, wanted: set[str], where: str
) -> Iterator[Finding]:
    model = with_adapter(args, torch.float32, targets=(role,)).train()
    held = {path: adapters.lora("default") for path, _, adapters in adapted_modules(model)}
    yield _none("adapters = the role's matrices", where, wanted ^ held.keys())
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    output = learnt(model, batch)
    given = [
        layer.ids_TA[layer.ids_TA >= 0].bincount(minlength=layer.logits_TE.size(-1))
        for layer in output.router
    ]
    met = {
        id(mixture): counts_E > 0 for mixture, counts_E in zip(mixtures(model), given, strict=True)
    }
    deaf = set()
    for path in wanted & held.keys():
        lora = held[path]
        assert lora is not None, "this adapter is low-rank everywhere"
        for key, weight in lora.named_parameters():
            assert isinstance(weight, nn.Parameter), "named_parameters gives those"
            learns = _learns(weight)
            owner = (
                model.get_submodule(path.partition(".experts.")[0]) if ".experts." in path else None
            )
            if not torch.equal(
                learns, torch.ones_like(learns) if owner is None else met[id(owner)]
            ):
                deaf.add(f"{path}.{key}")
    yield _none("adapters learn from what they met", where, deaf)
    trained = {key for path in wanted for key in before if key.startswith(f"{path}.lora.")}
    gradients = {key for key, weight in model.named_parameters() if weight.grad is not None}
    yield _none("gradients of adapters alone", where, gradients ^ trained)
    build_optimizer(model, OptimizerArgs(lr=0.01), device_type="cpu").step()
    moved = {
        key for key, weight in model.named_parameters() if not torch.equal(weight, before[key])
    }
    yield _none("adapters alone move", where, moved ^ trained)


def _learns(weight: nn.Parameter) -> Tensor:
    """Whether there is a gradient, for each expert [E] or in all [1]."""
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    learns = gradient.flatten(1).any(1) if weight.ndim == 3 else gradient.any()[None]
    return learns & gradient.isfinite().all()


def _none(comparison: str, where: str, names: set[str]) -> Finding:
    """A finding whose error is how many names there are, of which there should be none."""
    return Finding(
        comparison, where, float(len(names)), 0.0, f"not so: {min(names)}" if names else ""
    )


# -- gradients
# --------------------------------------------------------------------------------------------


def compare_gradients(
    args: ModelArgs, lora: dict[str, Any], batch: Batch, name: str
) -> Iterator[Finding]:
    """Loss and gradients of adapters against those of the merged weights, written out as functions
    of A and B.
    """
    tied = args.tie_embeddings  # a leaf that two places read has no adapter of its own at both
    model = with_adapter(
        args,
        torch.float64,
        targets=("all-linear", *(() if tied else ("tok_embeddings", "output"))),
        **lora,
    )
    objective = NextToken(model)
    output: TransformerOutput = model(replace(batch.inputs(), logits="none"))
    loss = objective.loss(output, batch, objective.units(batch))["loss"]
    plain, merged = sample_model(args), {}
    parts: dict[str, tuple[Tensor, Tensor]] = {}  # the adapter's own, and what stands for it here
    for path, _, adapters in adapted_modules(model):
        own = adapters.lora("default")
        assert own is not None, "this adapter is low-rank everywhere"
        copies = {
            key: weight.detach().clone().requires_grad_() for key, weight in own.named_parameters()
        }
        merged[f"{path}.weight"] = written_out(plain.get_submodule(path), own, copies)
        parts |= {
            f"{path}.{key}": (dict(own.named_parameters())[key], copy)
            for key, copy in copies.items()
        }
    whole: TransformerOutput = functional_call(plain, merged, (batch.inputs(),))
    expected = weighted_loss(whole, batch)
    tolerance = TOLERANCES[torch.float64]
    error = difference(loss, expected)
    yield Finding(
        "loss = merged weights'",
        name,
        error,
        tolerance,
        "another loss" if error > tolerance else "",
    )
    mine = torch.autograd.grad(loss, [weight for weight, _ in parts.values()])
    theirs = torch.autograd.grad(expected, [copy for _, copy in parts.values()])
    for key, gradient, other in zip(parts, mine, theirs, strict=True):
        error = difference(gradient, other)
        detail = (
            f"norm {float(gradient.norm()):.3g} instead of {float(other.norm()):.3g}"
            if error > tolerance
            else ""
        )
        yield Finding("gradients = merged weights'", f"{name}, {key}", error, tolerance, detail)


def written_out(leaf: nn.Module, lora: LoraWeights, parts: dict[str, Tensor]) -> Tensor:
    """W + scale B A; with DoRA at learned lengths, those it has being constants (arXiv 2402.09353,
    section 4.3).
    """
    weight = leaf.get_parameter("weight").detach()
    scale = {"alpha_over_rank": 1 / RANK, "rslora": RANK**-0.5}[lora.scaling] * ALPHA
    change = torch.einsum("...or,...ri->...oi", parts["B"], parts["A"])
    whole = weight + scale * (change if change.shape == weight.shape else change.mT)
    if "magnitude" not in parts:
        return whole
    inputs = (
        -1 if isinstance(leaf, nn.Linear) or weight.ndim == 3 else 0
    )  # columns of an embedding have lengths
    lengths = whole.detach().norm(dim=inputs, keepdim=True)
    return whole / lengths * parts["magnitude"].unsqueeze(inputs)


def weighted_loss(output: TransformerOutput, batch: Batch) -> Tensor:
    """Mean cross-entropy over the weights of the targets, from all logits."""
    assert output.logits is not None, "all logits are the default"
    nats_BT = F.cross_entropy(
        output.logits.mT, batch.targets, ignore_index=NO_TARGET, reduction="none"
    )
    weights_BT = (batch.targets != NO_TARGET).to(nats_BT.dtype)
    if batch.weights is not None:
        weights_BT = weights_BT * batch.weights
    return (nats_BT * weights_BT).sum() / weights_BT.sum()


# -- the model without its adapter
# ------------------------------------------------------------------------


@torch.no_grad()
def compare_reference(args: ModelArgs, pairs: Batch, name: str) -> Iterator[Finding]:
    """Bit for bit the base while its adapter is off, as before afterwards, and DPO against the base
    by hand.
    """
    base, model = (
        sample_model(args, dtype=torch.float32),
        with_adapter(args, torch.float32, modules_to_save=("norm",)),
    )
    expected, said = _logits(base, pairs), _logits(model, pairs)
    with adapters_off(model):
        off = _logits(model, pairs)
    for what, found, right in (
        ("off = base", off, expected),
        ("on again = before", _logits(model, pairs), said),
    ):
        error = float((found != right).float().mean())
        yield Finding(
            f"adapter {what}, bit for bit",
            name,
            error,
            0.0,
            f"{error:.1%} of the logits differ" if error else "",
        )
    policy_B, reference_B = (_log_probs(logits, pairs) for logits in (said, expected))
    gained_P = (policy_B - reference_B)[::2] - (policy_B - reference_B)[1::2]
    by_hand = -F.logsigmoid(BETA * gained_P).mean()
    objective = Preference(model, beta=BETA)
    output: TransformerOutput = model(replace(pairs.inputs(), logits="none"))
    loss = objective.loss(output, pairs, objective.units(pairs))["loss"]
    error, tolerance = difference(loss, by_hand), TOLERANCES[torch.float32]
    detail = f"{float(loss):.6g} instead of {float(by_hand):.6g}" if error > tolerance else ""
    yield Finding("DPO = by hand", name, error, tolerance, detail)


def _logits(model: LLM, batch: Batch) -> Tensor:
    logits = model(batch.inputs()).logits
    assert isinstance(logits, Tensor), "all logits are the default"
    return logits


def _log_probs(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Nats of the targets of each row [B]."""
    found_BT = (
        logits_BTV.log_softmax(-1).gather(-1, batch.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    )
    return (found_BT * (batch.targets != NO_TARGET)).sum(1)


# -- runs
# -------------------------------------------------------------------------------------------------


def compare_runs(args: ModelArgs, folder: Path, name: str) -> Iterator[Finding]:
    """Stopped and resumed runs against straight ones, and what a run leaves of the weights that it
    froze.
    """
    tokenizer = byte_tokenizer()
    base = sample_model(replace(args, vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    save(base, folder / "base", tokenizer=tokenizer)
    rows = [json.dumps(row) + "\n" for row in TALKS if "messages" in row]
    (folder / "rows.jsonl").write_text("".join(rows * 3), encoding="utf-8")
    run = tiny_finetune(folder, "run")
    with quiet():
        trained = history(run, folder, "frozen", [2])["weights"]
    frozen = {key: weight for key, weight in base.named_parameters() if key in trained}
    moved = {key for key, weight in frozen.items() if not torch.equal(weight, trained[key])}
    yield _none("frozen weights = base", name, moved)
    for found in compare_resumed(run, folder, STEPS):
        yield replace(found, case=f"{name}, {found.case}")


def tiny_finetune(folder: Path, name: str) -> TrainArgs:
    """A run in `folder / name`: LoRA with dropout on `folder / base`, `folder / rows.jsonl`
    packed.
    """
    config: dict[str, Any] = {
        "base": str(folder / "base"),
        "finetune": {"packing": True, "lora": {"rank": RANK, "dropout": DROPOUT}},
        "data": {
            "sources": [str(folder / "rows.jsonl")],
            "seq_len": SEQ_LEN,
            "batch_size": 2,
            "held_out": 0.1,
        },
        "optimizer": {"lr": 0.01, "weight_decay": 0.0},
        "steps": STEPS,
        "device": "cpu",
        "dtype": "float32",
    }
    return in_folder(read_config(None, base=config), folder, name)

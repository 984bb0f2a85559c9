"""Fine-tuning: loss masks, trained weights, gradients, resumed runs, and the base that stays.

Adapters must get the gradients of the merged weights that they stand for, nothing else may move,
and the model with its adapter off must be its base.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from transom.base.errors import expect, notice, require
from transom.checkpoints.load import load
from transom.checkpoints.open_model import open_text
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
from transom.lora.weights import LEAVES
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer
from transom.training.config import TrainArgs, read_config
from transom.training.finetune.args import FinetuneArgs
from transom.training.finetune.weights import choose_weights
from transom.training.loop.run_parts import base_folder
from transom.training.losses.log_probs import adapters_off
from transom.training.losses.objectives import NextToken
from transom.training.losses.preferences import Preference
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer
from transom.verify.adapters import merged_weight, randomize_adapters
from transom.verify.findings import TOLERANCES, Finding, close, exact
from transom.verify.finetune_rows import (
    CHATS,
    PAIRS,
    compare_losses,
    compare_masks,
    encoder_of,
    examples_of,
    sample_encoders,
    step_loss,
    target_weights,
    weighted_nats,
)
from transom.verify.resume import compare_resumed, history
from transom.verify.sample_models import SAMPLES, sample_model
from transom.verify.targets import has_weights, small_models
from transom.verify.tiny_runs import documents, in_folder, quiet, temporary_corpus

MOST_EXAMPLES, LOSS_ROWS = 1000, 8  # of a file: examples that are read, rows with a forward
RANK, ALPHA = 4, 6.0
STEPS, SEQ_LEN, DROPOUT = 4, 160, 0.2  # of the runs that are interrupted
BETA = 0.3  # of the DPO loss
LONG = {"max_seq_len": 1024}  # enough for all examples in one row
_LATENT = SAMPLES["deepseek"]
# Windows and chunks; experts with biases; latents, groups, shared experts and balancing biases.
MODELS: dict[str, dict[str, Any]] = {
    "mixed": {**SAMPLES["mixed"], **LONG},
    "gpt-oss": {**SAMPLES["gpt-oss"], **LONG},
    "deepseek": {**_LATENT, **LONG, "moe_args": {**_LATENT["moe_args"], "balance": "bias"}},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"scaling": "rslora"},
    "DoRA": {"dora": True},
}
# The matrices of each role of `lora.targets`, by name.
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
        for encoder_name, encoder in sample_encoders().items():
            for rows, name in ((CHATS, "conversation"), (PAIRS, "pair")):
                examples = examples_of(rows, name)
                bare = [one for one in examples if encoder.template is not None or one.bare]
                yield from compare_masks(bare, encoder, encoder_name)
        models = {name: ModelArgs.from_dict(fields) for name, fields in MODELS.items()}
    else:
        expected = f"valid only with a model folder, and {model} has no tokenizer"
        require(data is None or has_weights(model), "--data", data, expected)
        if has_weights(model):
            yield from compare_folder(model, data)
        models = dict(small_models(model, ()))
    name, args = list(models.items())[-1]
    with temporary_corpus() as folder:
        yield from compare_runs(args, folder, name)
    for name, args in models.items():
        yield from compare_model(args, name)


def compare_folder(name: str, data: str | None = None) -> Iterator[Finding]:
    """Compare the loss masks and losses of a folder's own tokenizer, chat template and weights.

    Raises:
        RequestError: If the model has a head in place of next-token logits.
    """
    folder = base_folder(name)
    head = read_args(folder).head
    expect(head is None, "head", head, "a language model")
    text, model = open_text(folder), load(folder, dtype="float32")
    examples = examples_of(CHATS, "conversation") if data is None else [*read_examples(data)]
    if len(examples) > MOST_EXAMPLES:
        notice(f"{data}: only the first {MOST_EXAMPLES:,} of {len(examples):,} examples are read")
        examples = examples[:MOST_EXAMPLES]
    template = template_for(examples, text.tokenizer, text.template)
    encoder = encoder_of(text.tokenizer, template, model.args.max_seq_len + 1)
    yield from compare_masks(examples, encoder, name)
    single = [one for one in examples if one.kind in ("chat", "completion", "text")]
    encoded = encoder.encode(single, [])
    if not encoded.items:
        notice(f"{data}: no losses are compared, since no conversation, completion or text fits")
        return
    shortest = sorted(encoded.items, key=lambda item: len(item[0].ids))[:LOSS_ROWS]
    yield from compare_losses(model, shortest, name)


def compare_model(args: ModelArgs, name: str) -> Iterator[Finding]:
    """Compare losses, trained weights, gradients and reference of a small model over bytes."""
    tokenizer = byte_tokenizer()
    args = replace(args, vocab_size=tokenizer.vocab_size)
    with quiet():
        chats, pairs = examples_of(CHATS, "conversation"), examples_of(PAIRS, "pair")
        template = template_for(chats, tokenizer, None)
        encoder = encoder_of(tokenizer, template, args.max_seq_len + 1)
        encoded, paired = encoder.encode(chats), encoder.encode(pairs)
    yield from compare_losses(sample_model(args, dtype=torch.float32), encoded.items, name)
    texts = [ChatExample(file, "text", text=text) for file, text in documents().items()]
    # Every token of a text is a target, so that every expert that is used gets a gradient.
    everything = packed_batch([[row for (row,) in encoder.encode(texts).items]])
    yield from compare_trained_weights(args, everything, name)
    batch = packed_batch([[row for (row,) in encoded.items]])
    for kind, lora in ADAPTERS.items():
        yield from compare_gradients(args, lora, batch, f"{name}, {kind}")
    yield from compare_reference(args, padded_batch(paired.items), name)


def with_adapter(args: ModelArgs, dtype: torch.dtype, **lora: Any) -> LLM:
    """Return a model with random weights and a random adapter, ready to be trained."""
    model = sample_model(args, dtype=dtype)
    finetune = FinetuneArgs(lora=LoraArgs.from_dict({"rank": RANK, "alpha": ALPHA, **lora}))
    choose_weights(model, finetune, 0, new_tokens=False)
    randomize_adapters(model, seed=3)
    return model


# -- what trains


def compare_trained_weights(args: ModelArgs, batch: Batch, name: str) -> Iterator[Finding]:
    """Compare which weights have adapters, get gradients and move, for every role of `targets`."""
    matrices = {
        key.removesuffix(".weight")
        for key, weight in sample_model(args).named_parameters()
        if weight.ndim > 1 and re.fullmatch(r"layers\..*\.weight", key)
    }
    for role in reversed(ROLES):  # all-linear comes first, since it fits every model
        places = {path for path in matrices if re.search(PLACES[role], f"{path}.")}
        if places:
            yield from _compare_role(args, batch, role, places, f"{name}, {role}")


def _compare_role(
    args: ModelArgs, batch: Batch, role: str, places: set[str], case: str
) -> Iterator[Finding]:
    """Train one step with adapters on one role; `places` are the matrices that must have one."""
    model = with_adapter(args, torch.float32, targets=(role,)).train()
    adapted = {path for path, _, _ in adapted_modules(model)}
    yield exact("adapters = matrices of the role", case, sorted(places ^ adapted))
    weights = dict(model.named_parameters())
    trained = {key for key in weights if key.partition(".lora.")[0] in places and ".lora." in key}
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    step_loss(model, NextToken(model), batch).backward()
    learning = {key for key, one in weights.items() if one.grad is not None and one.grad.any()}
    yield exact("only adapters get gradients", case, sorted(learning ^ trained))
    build_optimizer(model, OptimizerArgs(lr=0.01), device_type="cpu").step()
    moved = {key for key, weight in weights.items() if not torch.equal(weight, before[key])}
    yield exact("only adapters move", case, sorted(moved ^ trained))


# -- gradients


def compare_gradients(
    args: ModelArgs, lora: dict[str, Any], batch: Batch, name: str
) -> Iterator[Finding]:
    """Compare loss and gradients with those of merged weights, differentiated by the adapters."""
    targets = ["all-linear"] if args.tie_embeddings else ["all-linear", "tok_embeddings", "output"]
    model = with_adapter(args, torch.float64, targets=tuple(targets), **lora)
    loss = step_loss(model, NextToken(model), batch)
    plain, merged = sample_model(args), {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}  # a parameter of an adapter, and its copy
    for path, leaf, adapters in adapted_modules(model):
        own = adapters.lora("default")
        assert own is not None and isinstance(leaf, LEAVES), "all of these adapters are low-rank"
        twin = copy.deepcopy(own)
        weight = plain.get_parameter(f"{path}.weight").detach()
        merged[f"{path}.weight"] = merged_weight(leaf, weight, [twin])
        copies = dict(twin.named_parameters())
        pairs |= {f"{path}.{key}": (one, copies[key]) for key, one in own.named_parameters()}
    output: TransformerOutput = functional_call(plain, merged, (batch.inputs(),))
    assert output.logits is not None, "all logits are the default"
    weights = target_weights(batch).flatten()
    nats = weighted_nats(output.logits.flatten(0, 1), batch.targets.flatten(), weights)
    expected, tolerance = nats / weights.sum(), TOLERANCES[torch.float64]
    yield close("loss = loss of merged weights", name, loss, expected, tolerance)
    measured = torch.autograd.grad(loss, [one for one, _ in pairs.values()])
    gradients = torch.autograd.grad(expected, [twin for _, twin in pairs.values()])
    for key, mine, gradient in zip(pairs, measured, gradients, strict=True):
        detail = f"norm {float(mine.norm()):.3g} instead of {float(gradient.norm()):.3g}"
        case = f"{name}, {key}"
        yield close("gradients = merged weights", case, mine, gradient, tolerance, detail)


# -- the model without its adapter


@torch.no_grad()
def compare_reference(args: ModelArgs, pairs: Batch, name: str) -> Iterator[Finding]:
    """Compare the model with its adapter off with its base, and DPO with its formula."""
    base = sample_model(args, dtype=torch.float32)
    model = with_adapter(args, torch.float32, modules_to_save=("norm",))
    reference, policy = (one(pairs.inputs()).logits for one in (base, model))
    with adapters_off(model):
        off = model(pairs.inputs()).logits
    on = model(pairs.inputs()).logits
    for comparison, measured, expected in (
        ("adapter off = base, bit for bit", off, reference),
        ("adapter on again = before, bit for bit", on, policy),
    ):
        share = float((measured != expected).float().mean())
        yield exact(comparison, name, share, f"{share:.1%} of the logits differ")
    mask_BT = pairs.targets != NO_TARGET
    targets_BT1 = pairs.targets.clamp(min=0).unsqueeze(-1)
    gain_BT = (policy.log_softmax(-1) - reference.log_softmax(-1)).gather(-1, targets_BT1)[..., 0]
    gain_B = (gain_BT * mask_BT).sum(1)
    formula = -F.logsigmoid(BETA * (gain_B[::2] - gain_B[1::2])).mean()
    objective = Preference(model, FinetuneArgs(objective="dpo", beta=BETA))
    loss = step_loss(model, objective, pairs)
    detail = f"{float(loss):.6g} instead of {float(formula):.6g}"
    yield close("DPO = formula", name, loss, formula, TOLERANCES[torch.float32], detail)


# -- runs


def compare_runs(args: ModelArgs, folder: Path, name: str) -> Iterator[Finding]:
    """Compare resumed runs with one without interruption, and frozen weights with the base."""
    tokenizer = byte_tokenizer()
    base = sample_model(replace(args, vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    save(base, folder / "base", tokenizer=tokenizer)
    rows = [json.dumps(row) + "\n" for row in CHATS if "messages" in row]
    (folder / "rows.jsonl").write_text("".join(rows * 3), encoding="utf-8")
    run = tiny_finetune(folder, "run")
    with quiet():
        trained = history(run, folder, "frozen", [2])["weights"]
    frozen = {key: weight for key, weight in base.named_parameters() if key in trained}
    moved = {key for key, weight in frozen.items() if not torch.equal(weight, trained[key])}
    yield exact("frozen weights = base", name, sorted(moved))
    for finding in compare_resumed(run, folder, STEPS):
        yield replace(finding, case=f"{name}, {finding.case}")


def tiny_finetune(folder: Path, name: str) -> TrainArgs:
    """Return a run of LoRA with dropout on `folder / base`, with `folder / rows.jsonl` packed."""
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

"""The config of a fine-tuning run from a model, its data and a few settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, require
from transom.checkpoints.files.folders import Found, find_model, is_hub_id, is_model, read_args
from transom.config.model_args import ModelArgs
from transom.planning.counts import parameters
from transom.training.config import TrainArgs, read_config
from transom.training.finetune.args import PREFERENCES

EMBEDDED = "stdlib-docs"
SEQ_LEN = 1024  # tokens of the longest row by default
# Peak learning rates that work for most models; that of adapters, which start at zero, is ten times
# higher.
RATES = {("lora", False): 2e-4, ("full", False): 2e-5, ("lora", True): 2e-5, ("full", True): 1e-6}
DEFAULTS: dict[str, Any] = {
    "data": {"held_out": 0.05},
    "optimizer": {"weight_decay": 0.0},
    "schedule": {"kind": "cosine", "warmup": 0.03, "final": 0.1},
    "finetune": {"epochs": "auto"},
}
# Models as small as the demo's take a higher learning rate and need a higher rank.
SMALL_PARAMETERS, SMALL_RATE = 20_000_000, 50
RANK = {False: 16, True: 32}


def finetune_args(
    model: str,
    data: Sequence[str] = (),
    overrides: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    opened: Found | None = None,
) -> TrainArgs:
    """Return the config of a run that fine-tunes `model` on `data`, as `transom finetune` makes it.

    `config` has fields as in config.yaml, and `overrides` are words such as `finetune.method=full`.
    Fields that neither of them gives are chosen here by the model and the method, or by the rows
    when the run is opened. `opened` is the model if the caller has found it, which may be a
    tokenizer without a model.
    """
    stated = dict(config or {})
    given = dict(word.partition("=")[::2] for word in overrides)
    if "out" not in given and "out" not in stated:
        overrides = [f"out={default_out(model)}", *overrides]
    found = find_model(model) if opened is None else opened
    model_args = read_args(found.model) if opened is None or is_model(found.model) else None
    small = model_args is not None and parameters(model_args) < SMALL_PARAMETERS
    base = merged(defaults_for(model_args, small), stated)
    for section in DEFAULTS:
        expected = "expected a mapping of fields"
        require(isinstance(base[section], dict), section, base[section], expected)
    adapter = given.get("finetune.method", base["finetune"].get("method", "lora")) == "lora"
    if not adapter and "lora" not in stated.get("finetune", {}):
        del base["finetune"]["lora"]  # defaults for an adapter, which this run does not have
    if "steps" in given or "steps" in stated:
        base["finetune"]["epochs"] = None
    # The folder of the step, since a run may find a better step later.
    base["base"] = str(found.model) if found.adapter is None and Path(model).exists() else model
    if data:
        base["data"]["sources"] = list(data)
    first = read_config(None, overrides, base=base)
    require(bool(first.data.sources), "--data", None, f"expected a file, a folder or {EMBEDDED}")
    require(
        first.finetune is not None,
        "finetune",
        None,
        "expected the fields of fine-tuning; `transom train` continues on plain text",
    )
    assert first.finetune is not None
    if "finetune.lora.rank" in given and "finetune.lora.alpha" not in given:
        overrides = [*overrides, f"finetune.lora.alpha={2 * first.finetune.lora.rank}"]
    if "optimizer.lr" not in given and "lr" not in base["optimizer"]:
        rate = RATES[first.finetune.method, first.finetune.objective in (*PREFERENCES, "grpo")]
        base["optimizer"]["lr"] = rate * (SMALL_RATE if small else 1)
    return read_config(None, overrides, base=base)


def defaults_for(args: ModelArgs | None, small: bool) -> dict[str, Any]:
    """Return the defaults for a model; `args` is None for a tokenizer without a model."""
    base = {key: dict(value) for key, value in DEFAULTS.items()}
    base["data"]["seq_len"] = SEQ_LEN if args is None else min(args.max_seq_len, SEQ_LEN)
    widths = [] if args is None else [layer.n_kv_heads * layer.head_dim for layer in args.layers]
    rank = min([RANK[small], *widths])
    # The rank of a change to a matrix is at most its shorter side.
    base["finetune"]["lora"] = {"rank": rank, "alpha": 2.0 * rank}
    return base


def merged(defaults: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults, replaced field by field with the values of a config."""
    both = {
        key: {**defaults[key], **stated[key]}
        for key in defaults
        if isinstance(stated.get(key), dict)
    }
    return {**defaults, **stated, **both}


def default_out(model: str) -> str:
    """Return `runs/demo-finetune` for `runs/demo`, and a folder below `runs` for a hub id."""
    if not Path(model).exists() and is_hub_id(model):
        return f"runs/{model.rpartition('/')[2]}-finetune"
    path = Path(model.rstrip("/"))
    if not path.exists():
        raise RequestError(f"{path}: no such folder; expected a model or run folder, or a hub id")
    return f"{path}-finetune"

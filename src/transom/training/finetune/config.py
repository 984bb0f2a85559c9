"""The config of a fine-tuning run, from a model, its data and a few settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transom.base.errors import expect
from transom.base.files import shown_name
from transom.base.yaml_files import read_yaml
from transom.checkpoints.files.hub import is_hub_id
from transom.checkpoints.files.layout import is_model
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.files.packaged import is_packaged
from transom.checkpoints.read_args import read_args
from transom.config.model_args import ModelArgs
from transom.planning.counts import parameters
from transom.training.config import TrainArgs, read_config
from transom.training.finetune.args import PREFERENCES

EMBEDDED = "stdlib-docs"
SEQ_LEN = 1024  # tokens of the longest row by default
# Peak learning rates by method and by whether the objective compares answers. Adapters start at
# zero and take ten times the rate.
RATES = {
    ("lora", False): 2e-4,
    ("full", False): 2e-5,
    ("lora", True): 2e-5,
    ("full", True): 1e-6,
}
# Models as small as the demo's take a higher learning rate and need a higher rank.
SMALL_PARAMETERS, SMALL_RATE = 20_000_000, 50
RANK = {False: 16, True: 32}


def finetune_args(
    model: str,
    data: Sequence[str] = (),
    overrides: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    opened: ModelLocation | None = None,
) -> TrainArgs:
    """Return the config of a run that fine-tunes `model` on `data`, as `transom finetune` makes it.

    Fields that are given nowhere get defaults for the model and the method. Those that depend on
    the rows are chosen when the run is opened.

    Args:
        model: Folder or hub id of the base.
        data: Files, folders or names of data sets; none if `config` or `overrides` give them.
        overrides: Words such as `finetune.method=full`. They take precedence over `config`.
        config: Fields as in config.yaml.
        opened: The location of `model` if the caller has found it, which may be a tokenizer
            without a model.

    Raises:
        RequestError: There is no such model, a field is wrong, or no data is given.
    """
    stated = dict(config or {})
    given = dict(word.partition("=")[::2] for word in overrides)
    if "out" not in given and "out" not in stated:
        overrides = [f"out={default_out(model)}", *overrides]
    found = find_model(model) if opened is None else opened
    model_args = read_args(found.model) if opened is None or is_model(found.model) else None
    small = model_args is not None and parameters(model_args) < SMALL_PARAMETERS
    defaults = defaults_for(model_args, small)
    for section in defaults:
        fits = isinstance(stated.get(section, {}), dict)
        expect(fits, section, stated.get(section), "a mapping of fields")
    finetune = stated.get("finetune", {})
    adapter = given.get("finetune.method", finetune.get("method", "lora")) == "lora"
    if not adapter or "lora" in finetune:
        del defaults["finetune"]["lora"]
    base = merged(defaults, stated)
    if "steps" in given or "steps" in stated:
        base["finetune"]["epochs"] = None
    # The folder of the step, since a run may find a better step later.
    keep = found.adapter is not None or not Path(model).exists()
    base["base"] = model if keep else shown_name(found.model)
    if data:
        base["data"]["sources"] = list(data)
    first = read_config(None, overrides, base=base)
    expect(bool(first.data.sources), "--data", None, f"a file, a folder or {EMBEDDED}")
    fields = "the fields of fine-tuning; `transom train` continues on plain text"
    expect(first.finetune is not None, "finetune", None, fields)
    if "finetune.lora.rank" in given and "finetune.lora.alpha" not in given:
        overrides = [*overrides, f"finetune.lora.alpha={2 * first.finetune_settings.lora.rank}"]
    if "optimizer.lr" not in given and "lr" not in base["optimizer"]:
        compares = first.finetune_settings.objective in (*PREFERENCES, "grpo")
        rate = RATES[first.finetune_settings.method, compares]
        base["optimizer"]["lr"] = rate * (SMALL_RATE if small else 1)
    return read_config(None, overrides, base=base)


def resumed_args(
    model: str,
    data: Sequence[str] = (),
    overrides: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> TrainArgs | None:
    """Return the config of the run to resume, with the given fields; None if no run has begun.

    The run is `out` of `overrides`, or else the default run of `model`, or else `model` itself.
    The trainer refuses fields that must not change. For the arguments see `finetune_args`.

    Raises:
        RequestError: The run is not a fine-tuning run of this model on this data.
    """
    out = dict(word.partition("=")[::2] for word in overrides).get("out")
    run = Path(default_out(model) if out is None else out).expanduser()
    if not (run / "config.yaml").exists():
        own = Path(model) / "config.yaml"
        if out is not None or not own.exists() or read_config(own).finetune is None:
            return None
        run = Path(model)
    stored = read_config(run / "config.yaml")
    expected = "with --resume a fine-tuning run, or its base"
    expect(stored.finetune is not None, "MODEL", str(run), expected)
    if run != Path(model):
        base = Path(stored.base or "").resolve()
        same = model == stored.base or Path(model).resolve() in (base, *base.parents)
        expect(same, "MODEL", model, f"with --resume of {run} its base, {stored.base}")
    sources = [source.path for source in stored.data.source_list]
    same = not data or list(data) == sources
    expect(same, "--data", list(data), f"with --resume none, or that of the run: {sources}")
    fields = merged(read_yaml(run / "config.yaml"), dict(config or {}))
    return read_config(None, [f"out={run}", *overrides], base=fields)


def defaults_for(args: ModelArgs | None, small: bool) -> dict[str, Any]:
    """Return the defaults of a model; `args` is None for a tokenizer without a model."""
    widths = [] if args is None else [one.n_kv_heads * one.head_dim for one in args.layers]
    # The rank of a change to a matrix is at most its shorter side.
    rank = min([RANK[small], *widths])
    return {
        "data": {
            "held_out": 0.05,
            "seq_len": SEQ_LEN if args is None else min(args.max_seq_len, SEQ_LEN),
        },
        "optimizer": {"weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup": 0.03, "final": 0.1},
        "finetune": {"epochs": "auto", "lora": {"rank": rank, "alpha": 2.0 * rank}},
    }


def merged(below: Any, above: Any) -> Any:
    """Return `below` with its fields replaced by those of `above`, also in nested mappings."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}


def default_out(model: str) -> str:
    """Return `runs/demo-finetune` for `runs/demo`, and a folder below `runs` for other names.

    Other names are hub ids and those of models that packages carry.
    """
    if is_packaged(model) or (not Path(model).exists() and is_hub_id(model)):
        return f"runs/{model.rpartition('/')[2]}-finetune"
    path = Path(model.rstrip("/"))
    expect(path.exists(), "MODEL", str(path), "a model or run folder, a GGUF file, or a hub id")
    return f"{path}-finetune"

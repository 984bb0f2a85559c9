"""PEFT's `adapter_config.json`: whether a folder is an adapter, and of what; what it says, what is
refused, and how ours is said. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, notice
from transom.base.files import read_json, refuse_infinite, safetensors_header
from transom.lora.args import Scaling

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight")
# Weights of a whole model: with these beside it, the adapter is one that has been merged.
_WHOLE = ("model*.safetensors*", "consolidated*")
# What a file may say of these changes nothing of what a trained adapter computes.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# What says which modules carry what; the keys of the weights say so too, and they are all accounted
# for.
_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "use_dora",
        "use_rslora",
    }
)
# Starts that leave the base weights alone; others (pissa, olora, corda, loftq, lora_ga) subtract
# from them.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class PeftConfig:
    """The part of the file that the arithmetic needs."""

    r: int
    alpha: float
    scaling: Scaling
    dropout: float
    dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: Sequence[str]
    ensure_weight_tying: bool
    base: str | None

    def rank_of(self, key: str) -> int:
        """The rank of the module or parameter at this path."""
        return _by_pattern(self.rank_pattern, key, self.r)

    def alpha_of(self, key: str) -> float:
        """Its alpha."""
        return float(_by_pattern(self.alpha_pattern, key, self.alpha))


def _by_pattern(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    return next(
        (value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", key)), default
    )


def trained_vocabulary(folder: str | Path) -> int | None:
    """Rows of the embeddings that an adapter brings along, None where it leaves the base's as they
    are.
    """
    header = safetensors_header(Path(folder) / WEIGHTS) or {}
    try:
        shapes = [entry["shape"] for key, entry in header.items() if key.endswith(EMBEDDINGS)]
        return int(shapes[0][0]) if shapes else None
    except (ValueError, LookupError, TypeError):
        return None  # whoever reads the weights says what is wrong with them


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model; the config of its base may lie beside it."""
    here = Path(folder)
    return (here / CONFIG).exists() and not any(any(here.glob(pattern)) for pattern in _WHOLE)


def base_of(folder: str | Path) -> str:
    """What `adapter_config.json` names as the base: a folder or a hub id; naming none is a
    `RequestError`.

    A path may be meant from here, as PEFT means it, from the adapter's folder, or from the run of
    which that is a step. The first that is there counts; if another is there too, the choice is
    said.
    """
    here = Path(folder)
    base = read_json(here / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RequestError(
            f"{here / CONFIG}: base_model_name_or_path: got {base!r}; expected the folder or id "
            f"of a model"
        )
    run = here / ".."
    places = [Path(base), here / base, *([run / base] if (run / "latest").exists() else [])]
    found = [place for place in places if place.is_dir()]
    others = [place for place in found[1:] if place.resolve() != found[0].resolve()]
    if others:
        notice(
            f"{here / CONFIG}: the base {base} is taken to be {found[0].resolve()}, not "
            f"{others[0].resolve()}"
        )
    return str(found[0]) if found else base


def base_revision(folder: str | Path) -> str | None:
    """The branch, tag or commit of the base's hub id that `adapter_config.json` names."""
    path = Path(folder) / CONFIG
    revision = read_json(path).get("revision")
    if revision is not None and not isinstance(revision, str):
        raise RequestError(
            f"{path}: revision: got {revision!r}; expected a branch, tag or commit, or null"
        )
    return revision


def read_peft(config: Mapping[str, Any], where: str) -> PeftConfig:
    """The config of a LoRA adapter; a feature that is not computed here is a `RequestError` naming
    it.
    """
    refuse_infinite(config, where)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RequestError(f"{where}: peft_type: got {kind!r}; expected LORA")
    for key, value in config.items():
        if key not in _HARMLESS | _READ and value not in (None, False, {}, []):
            raise RequestError(
                f"{where}: {key}: got {value!r}; this feature of PEFT is not "
                f"supported; expected none"
            )
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise RequestError(
            f"{where}: init_lora_weights: got {start!r}, which changes the base weights; expected "
            "an "
            f"adapter that PEFT "
            "has converted to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    try:
        made = PeftConfig(
            r=int(config.get("r", 8)),
            alpha=float(config.get("lora_alpha", 8)),
            scaling="rslora" if config.get("use_rslora") else "alpha_over_rank",
            dropout=float(config.get("lora_dropout") or 0.0),
            dora=bool(config.get("use_dora", False)),
            rank_pattern={str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={
                str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()
            },
            target_parameters=[str(name) for name in config.get("target_parameters") or ()],
            ensure_weight_tying=bool(config.get("ensure_weight_tying", False)),
            base=config.get("base_model_name_or_path"),
        )
        for pattern in (*made.rank_pattern, *made.alpha_pattern):
            re.compile(pattern)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise RequestError(f"{where}: not a LoRA config of PEFT ({error})") from None
    return made


def summary(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says in short: kind, rank, alpha, and what carries the adapter."""
    data = read_json(folder / CONFIG)
    config = read_peft(data, str(folder / CONFIG))
    kind = "DoRA" if config.dora else "rsLoRA" if config.scaling == "rslora" else "LoRA"
    named = [
        data.get(key) or [] for key in ("target_modules", "target_parameters", "modules_to_save")
    ]
    targets = [one for some in named for one in ([some] if isinstance(some, str) else some)]
    return {
        "kind": kind,
        "rank": config.r,
        "alpha": config.alpha,
        "targets": sorted(map(str, targets)),
    }


def write_peft(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    known: Iterable[str],
    parameters: Iterable[str],
    *,
    rslora: bool,
    dora: bool,
    dropout: float,
    modules_to_save: Sequence[str],
    base: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    """The file for adapters at these paths: `ranks` and `alphas` by path, `parameters` those that
    are no modules.

    `known` are all paths that could carry one: where every path of an ending does, the ending alone
    is written.
    """
    held = set(parameters)
    modules = [path for path in ranks if path not in held]
    ends = sorted({path.rpartition(".")[2] for path in modules})
    alike = sorted(path for path in known if path.rpartition(".")[2] in ends and path not in held)
    r, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _whole(alpha),
        "use_rslora": rslora,
        "use_dora": dora,
        "lora_dropout": dropout,
        "target_modules": ends if alike == sorted(modules) else sorted(modules),
        "target_parameters": sorted(path for path in ranks if path in held) or None,
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {re.escape(path): _whole(a) for path, a in alphas.items() if a != alpha},
        "modules_to_save": list(modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _most_common(values: Iterable[Any]) -> Any:
    listed = list(values)
    return max(listed, key=listed.count) if listed else 8


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value

"""PEFT's `adapter_config.json`: the base it names, the fields that are read, and writing it.

This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transom.base.errors import RequestError, notice, require
from transom.base.files import read_json, refuse_infinite, safetensors_header
from transom.checkpoints.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from transom.lora.args import Scaling

EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight")
# Fields that change nothing of what a trained adapter computes.
_HARMLESS = """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config
    inference_mode loftq_config lora_ga_config megatron_core peft_version qalora_group_size revision
    runtime_config task_type"""
# Fields that are read, or that state which modules carry what. The keys of the weights state that
# too, and every key is accounted for.
_READ = """alpha_pattern bias exclude_modules init_lora_weights layers_pattern layers_to_transform
    lora_alpha lora_dropout modules_to_save peft_type r rank_pattern target_modules
    target_parameters use_dora use_rslora"""
_KNOWN = frozenset(f"{_HARMLESS} {_READ}".split())
# Initializations that leave the base weights as they are. The others (pissa, olora, corda, loftq,
# lora_ga) subtract from them.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class PeftConfig:
    """The fields that decide what an adapter computes.

    Ranks and alphas are those of a path of the patterns, which are regular expressions, or else `r`
    and `alpha`.
    """

    r: int
    alpha: float
    scaling: Scaling
    dropout: float
    dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: Sequence[str]
    ensure_weight_tying: bool

    def rank_of(self, path: str) -> int:
        """Return the rank of the module or parameter at a path."""
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def alpha_of(self, path: str) -> float:
        """Return the alpha of the module or parameter at a path."""
        return float(_by_pattern(self.alpha_pattern, path, self.alpha))

    def is_target_parameter(self, path: str) -> bool:
        """Return whether `target_parameters` names the parameter at a path."""
        return any(path == one or path.endswith(f".{one}") for one in self.target_parameters)


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    matching = (value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", path))
    return next(matching, default)


def trained_vocabulary(folder: str | Path) -> int | None:
    """Return the number of rows of an adapter's own embeddings, or None if it has none."""
    header = safetensors_header(Path(folder) / ADAPTER_WEIGHTS) or {}
    try:
        shapes = [entry["shape"] for key, entry in header.items() if key.endswith(EMBEDDINGS)]
        return int(shapes[0][0]) if shapes else None
    except (ValueError, LookupError, TypeError):
        return None  # reading the weights reports what is wrong with them


def base_of(folder: str | Path) -> str:
    """Return the folder or hub id that `adapter_config.json` names as the base.

    A path is relative to the current directory, as in PEFT, to the adapter's folder, or to the run
    of which that is a step. The first one that exists is taken; a notice is printed if another
    exists too.

    Raises:
        RequestError: No base is named.
    """
    here = Path(folder)
    field, base = (
        f"{here / ADAPTER_CONFIG}: base_model_name_or_path",
        _field(folder, "base_model_name_or_path"),
    )
    if not isinstance(base, str) or not base:
        raise RequestError(f"{field}: got {base!r}; expected the folder or id of a model")
    run = here / ".."
    places = [Path(base), here / base, *([run / base] if (run / "latest").exists() else [])]
    found = [place for place in places if place.is_dir()]
    others = [place.resolve() for place in found if place.resolve() != found[0].resolve()]
    if others:
        notice(f"{field}: {base} is taken to be {found[0].resolve()}, not {others[0]}")
    return str(found[0]) if found else base


def base_revision(folder: str | Path) -> str | None:
    """Return the branch, tag or commit of the base's hub id that `adapter_config.json` names.

    Raises:
        RequestError: It is not a text.
    """
    revision = _field(folder, "revision")
    right = revision is None or isinstance(revision, str)
    field = f"{Path(folder) / ADAPTER_CONFIG}: revision"
    require(right, field, revision, "expected a branch, tag or commit, or null")
    return None if revision is None else str(revision)


def _field(folder: str | Path, name: str) -> Any:
    return read_json(Path(folder) / ADAPTER_CONFIG).get(name)


def read_peft(config: Mapping[str, Any], where: str) -> PeftConfig:
    """Return the fields of a LoRA adapter's config; `where` names the file in messages.

    Raises:
        RequestError: It is no LoRA, a field has a wrong value, or a feature is not supported.
    """
    refuse_infinite(config, where)
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    require(kind == "LORA", f"{where}: peft_type", kind, "expected LORA")
    for key, value in config.items():
        fits = key in _KNOWN or value in (None, False, {}, [])
        require(
            fits, f"{where}: {key}", value, "this feature of PEFT is not supported; expected none"
        )
    plain = (
        "this changes the base weights; expected an adapter that PEFT has converted to plain LoRA "
        "(path_initial_model_for_weight_conversion)"
    )
    require(start in _STARTS, f"{where}: init_lora_weights", start, plain)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
        return PeftConfig(
            r=int(config.get("r", 8)),
            alpha=float(config.get("lora_alpha", 8)),
            scaling="rslora" if config.get("use_rslora") else "alpha_over_rank",
            dropout=float(config.get("lora_dropout") or 0.0),
            dora=bool(config.get("use_dora", False)),
            rank_pattern={str(pattern): int(rank) for pattern, rank in ranks.items()},
            alpha_pattern={str(pattern): float(alpha) for pattern, alpha in alphas.items()},
            target_parameters=[str(name) for name in config.get("target_parameters") or ()],
            ensure_weight_tying=bool(config.get("ensure_weight_tying", False)),
        )
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise RequestError(f"{where}: not a LoRA config of PEFT ({error})") from None


def summary(folder: Path) -> dict[str, Any]:
    """Return the kind, rank and alpha of an adapter, and the modules and parameters it is on."""
    data = read_json(folder / ADAPTER_CONFIG)
    config = read_peft(data, str(folder / ADAPTER_CONFIG))
    kind = "DoRA" if config.dora else "rsLoRA" if config.scaling == "rslora" else "LoRA"
    targets: list[str] = []
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        named = data.get(key) or []
        targets += [named] if isinstance(named, str) else map(str, named)
    return {"kind": kind, "rank": config.r, "alpha": config.alpha, "targets": sorted(targets)}


class PeftTarget(NamedTuple):
    """A module, or a parameter of one, with an adapter; `path` is that in the model in memory."""

    path: str
    rank: int
    alpha: float
    is_parameter: bool


def write_peft(
    targets: Sequence[PeftTarget], known: Iterable[str], **fields: Any
) -> dict[str, Any]:
    """Return the config of an adapter.

    Args:
        targets: All modules and parameters with a low-rank adapter.
        known: The paths of all modules that could have one. If every module of a name has one, the
            name is written instead of the paths.
        fields: Further fields of the config.
    """
    modules = sorted(one.path for one in targets if not one.is_parameter)
    parameters = sorted(one.path for one in targets if one.is_parameter)
    ends = sorted({path.rpartition(".")[2] for path in modules})
    alike = sorted(p for p in known if p.rpartition(".")[2] in ends and p not in parameters)
    r, alpha = (_most_common([one[i] for one in targets]) for i in (1, 2))
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(alpha),
        "target_modules": ends if alike == modules else modules,
        "target_parameters": parameters or None,
        "rank_pattern": {re.escape(one.path): one.rank for one in targets if one.rank != r},
        "alpha_pattern": {
            re.escape(one.path): _plain(one.alpha) for one in targets if one.alpha != alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **fields,
    }


def _most_common(values: Sequence[Any]) -> Any:
    return max(values, key=values.count) if values else 8


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value

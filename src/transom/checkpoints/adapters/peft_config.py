"""PEFT's `adapter_config.json`: the base it names, the fields that are read, and writing it.

This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transom.base import fields
from transom.base.errors import RequestError, expect, located, notice, require
from transom.base.files import read_json, refuse_infinite, safetensors_header
from transom.checkpoints.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from transom.lora.args import Scaling

EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight")
# Fields that change nothing of what a trained adapter computes, or that state which modules carry
# what. The keys of the weights state that too, and every key is accounted for.
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_ga_config", "megatron_core", "modules_to_save", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
)


@dataclass(frozen=True)
class PeftConfig:
    """The fields of PEFT's config that decide what an adapter computes.

    Ranks and alphas are those of a path of the patterns, which are regular expressions, or else `r`
    and `lora_alpha`. A rank of None is that of the tensors.

    Raises:
        RequestError: A pattern is no regular expression, or `init_lora_weights` names an
            initialization that subtracts from the base weights (pissa, olora, corda, loftq,
            lora_ga).
    """

    peft_type: Literal["LORA"]
    r: int | None = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        plain = self.init_lora_weights in (True, False, "gaussian", "eva", "orthogonal", "mica")
        expected = "plain LoRA (path_initial_model_for_weight_conversion in PEFT)"
        expect(plain, "init_lora_weights", self.init_lora_weights, expected)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            fields.regex(pattern, "pattern")

    @property
    def scaling(self) -> Scaling:
        """How the scale follows from alpha and rank."""
        return "rslora" if self.use_rslora else "alpha_over_rank"

    def is_target_parameter(self, paths: Sequence[str]) -> bool:
        """Return whether `target_parameters` names the parameter that has these paths."""
        ends = [f".{one}" for one in self.target_parameters]
        return any(f".{path}".endswith(end) for path in paths for end in ends)

    def rank_and_alpha(self, paths: Sequence[str]) -> tuple[int | None, float]:
        """Return rank and alpha of the module or parameter that has these paths."""
        weights = [f"{path}.weight" for path in paths]
        names = weights if self.is_target_parameter(weights) else paths
        rank = _by_pattern(self.rank_pattern, names, self.r)
        return rank, _by_pattern(self.alpha_pattern, names, self.lora_alpha)


def _by_pattern(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    found = (p for p in patterns for name in names if re.match(rf"(.*\.)?({p})$", name))
    return next((patterns[pattern] for pattern in found), default)


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
    here, base = Path(folder), _field(folder, "base_model_name_or_path")
    where = f"{here / ADAPTER_CONFIG}: base_model_name_or_path"
    if not isinstance(base, str) or not base:
        raise RequestError(f"{where}: got {base!r}; expected the folder or id of a model")
    run = here / ".."
    places = [Path(base), here / base, *([run / base] if (run / "latest").exists() else [])]
    found = [place for place in places if place.exists()]
    others = [place.resolve() for place in found if place.resolve() != found[0].resolve()]
    if others:
        notice(f"{where}: {base} is taken to be {found[0].resolve()}, not {others[0]}")
    return str(found[0]) if found else base


def base_revision(folder: str | Path) -> str | None:
    """Return the branch, tag or commit of the base's hub id that `adapter_config.json` names.

    Raises:
        RequestError: It is not a text.
    """
    revision: str | None = _field(folder, "revision")
    where, right = f"{Path(folder) / ADAPTER_CONFIG}: revision", isinstance(revision, str | None)
    expect(right, where, revision, "a branch, tag or commit, or null")
    return revision


def _field(folder: str | Path, name: str) -> Any:
    return read_json(Path(folder) / ADAPTER_CONFIG).get(name)


def read_peft(config: Mapping[str, Any], where: str) -> PeftConfig:
    """Return the fields of a LoRA adapter's config; `where` names the file in messages.

    Raises:
        RequestError: It is no LoRA, a field has a wrong value, or a feature is not supported.
    """
    refuse_infinite(config, where)
    known, unsupported = fields.field_types(PeftConfig), "this feature of PEFT is not supported"
    for key, value in config.items():
        fits = key in known or key in _HARMLESS or value in (None, False, {}, [])
        require(fits, f"{where}: {key}", value, f"{unsupported}; expected none")
    stated = {key: config[key] for key in known if config.get(key) is not None}
    with located(where):
        made = fields.read(PeftConfig, stated)
    return made


def summary(folder: Path) -> dict[str, Any]:
    """Return the kind, rank and alpha of an adapter, and the modules and parameters it is on."""
    data = read_json(folder / ADAPTER_CONFIG)
    config = read_peft(data, str(folder / ADAPTER_CONFIG))
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    targets: list[str] = []
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        named = data.get(key) or []
        targets += [named] if isinstance(named, str) else map(str, named)
    return {"kind": kind, "rank": config.r, "alpha": config.lora_alpha, "targets": sorted(targets)}


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

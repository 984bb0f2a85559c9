"""Rotary settings of a Hugging Face config, in both spellings, as fields of `ModelArgs`. No
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.base.errors import require
from transom.checkpoints.families.foreign_config import ForeignConfig

# What each kind reads beside rope_type and rope_theta. `original_...` is allowed everywhere: files
# carry it along.
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
_ALIASES = {"su": "longrope"}
_COMMON = (
    "rope_type",
    "type",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)


def rope_settings(config: ForeignConfig) -> dict[str, Any]:
    """The flat mapping of a config: `rope_parameters` (transformers 5), `rope_scaling` and its
    neighbours (4).
    """
    newer, older = config.get("rope_parameters", {}), config.get("rope_scaling", {})
    settings = dict(
        older or newer
    )  # where a file has both, transformers takes all from the older one
    for key in ("rope_theta", "partial_rotary_factor"):
        beside = config.get(key)
        if beside is not None:
            settings.setdefault(key, beside)
    settings.setdefault("rope_theta", 10000.0)
    return settings


def rope_fields(
    config: ForeignConfig, settings: Mapping[str, Any], aliases: Mapping[str, str] = _ALIASES
) -> dict[str, Any]:
    """`rope_theta`, `rotary_fraction` and the scaling fields of one mapping of rotary settings."""
    kind = settings.get("rope_type", settings.get("type")) or "default"
    kind = aliases.get(kind, kind)
    where = f"{config.where}: rope_type"
    require(kind in _KEYS, where, kind, f"expected {', '.join(_KEYS)}")
    for key in ("mrope_section", "mrope_interleaved"):
        expected = "positions in three dimensions are not supported; expected none"
        require(
            settings.get(key) is None,
            f"{config.where}: rope_parameters.{key}",
            settings.get(key),
            expected,
        )
    ignored = [key for key in settings if key not in _COMMON and key not in _KEYS[kind]]
    if ignored:
        config.note(f"keys that rope_type {kind!r} does not have are ignored: {', '.join(ignored)}")
    out: dict[str, Any] = {"rope_theta": settings["rope_theta"]}
    share = settings.get("partial_rotary_factor")
    if share is not None:
        out["rotary_fraction"] = share
    beside = config.get("original_max_position_embeddings")  # where Phi-3 keeps it
    if kind == "default":
        return out
    given = {key: settings[key] for key in _KEYS[kind] if settings.get(key) is not None}
    longest = config["max_position_embeddings"]
    # A file without one means that its length is the original; dynamic knows no other.
    original = beside or settings.get("original_max_position_embeddings")
    original = longest if original is None or kind == "dynamic" else original
    if kind in ("yarn", "longrope"):
        given.setdefault("factor", longest / original)
    for key in ("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"):
        present = key in given or key not in _KEYS[kind]
        require(
            present,
            f"{config.where}: rope_parameters.{key}",
            None,
            f"rope_type {kind!r} needs a value",
        )
    if kind == "llama3":
        return out | {
            "use_scaled_rope": True,
            "rope_scaling_factor": given["factor"],
            "rope_low_freq_factor": given["low_freq_factor"],
            "rope_high_freq_factor": given["high_freq_factor"],
            "rope_original_max_seq_len": original,
        }
    for key in (
        "mscale",
        "mscale_all_dim",
    ):  # only both together scale cos and sin; 0 is as good as absent
        if not (settings.get("mscale") and settings.get("mscale_all_dim")):
            given.pop(key, None)
    for key in ("beta_fast", "beta_slow"):
        if not given.get(key, 1):
            del given[key]
    if kind == "dynamic":  # the length in the file is where stretching begins, not where it ends
        out["max_seq_len"] = int(longest * given["factor"])
    return out | {"rope_scaling": {"kind": kind, "original_max_seq_len": original, **given}}


def rope_to_hf(fields: Mapping[str, Any], scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The other way: `rope_parameters` of `ModelArgs` fields and of the resolved scaling as plain
    data.
    """
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    if fields["rotary_fraction"] != 1.0:
        out["partial_rotary_factor"] = fields["rotary_fraction"]
    if scaling is None:
        return out
    kind = scaling["kind"]
    out |= {key: scaling[key] for key in _KEYS[kind] if scaling[key] is not None}
    return out | {
        "rope_type": kind,
        "original_max_position_embeddings": scaling["original_max_seq_len"],
    }


def require_whole_rotary(config: ForeignConfig, rope: Mapping[str, Any]) -> None:
    """Only Phi-3 rotates a part of each head; elsewhere transformers ignores the key or fails on
    it.
    """
    share = rope.get("rotary_fraction", 1.0)
    require(share == 1.0, f"{config.where}: partial_rotary_factor", share, "expected 1.0")

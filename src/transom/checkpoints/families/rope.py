"""Rotary settings of a Hugging Face config, in the spellings of transformers 4 and 5. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.base.errors import expect
from transom.base.fields import write
from transom.checkpoints.families.family import Fields, Keys, Option
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.config.model_args import ModelArgs

# What each kind reads beside the keys that all kinds may have.
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
_COMMON = (
    "rope_type",
    "type",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
_MROPE = ("mrope_section", "mrope_interleaved")
_MSCALE = ("mscale", "mscale_all_dim")
_ZERO_IS_ABSENT = ("beta_fast", "beta_slow")
_REQUIRED = ("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor")


def rope_settings(config: ForeignConfig) -> dict[str, Any]:
    """Return `rope_parameters` (transformers 5), or `rope_scaling` and the keys beside it (4),
    as one mapping.
    """
    newer, older = config.get("rope_parameters", {}), config.get("rope_scaling", {})
    # Where a file has both, transformers takes all from the older one.
    settings = dict(older or newer)
    alike = not any(isinstance(value, Mapping) for value in settings.values())
    config.check(alike, "rope_parameters", "one mapping for all layers")
    for key in ("rope_theta", "partial_rotary_factor"):
        beside = config.get(key)
        if beside is not None:
            settings.setdefault(key, beside)
    settings.setdefault("rope_theta", 10000.0)
    return settings


def rope_fields(
    config: ForeignConfig, settings: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> Fields:
    """Return `rope_theta`, `rotary_fraction` and the scaling of one mapping of rotary settings.

    `aliases` are other names of kinds.
    """
    kind = settings.get("rope_type", settings.get("type")) or "default"
    kind = (aliases or {"su": "longrope"}).get(kind, kind)
    expect(kind in _KEYS, f"{config.where}: rope_type", kind, ", ".join(_KEYS))
    turned = {key: settings[key] for key in _MROPE if settings.get(key) is not None}
    expected = "positions in one dimension; those in three are not supported"
    expect(not turned, f"{config.where}: rope_parameters", turned, expected)
    ignored = [key for key in settings if key not in _COMMON and key not in _KEYS[kind]]
    if ignored:
        config.note(f"keys that rope_type {kind!r} does not have are ignored: {', '.join(ignored)}")
    out: Fields = {"rope_theta": settings["rope_theta"]}
    if settings.get("partial_rotary_factor") is not None:
        out["rotary_fraction"] = settings["partial_rotary_factor"]
    beside = config.get("original_max_position_embeddings")  # where Phi-3 keeps it
    if kind == "default":
        return out
    longest = config["max_position_embeddings"]
    original = beside or settings.get("original_max_position_embeddings")
    off = () if all(settings.get(key) for key in _MSCALE) else _MSCALE  # one alone does nothing
    given = {key: settings.get(key) for key in _KEYS[kind] if key not in off}
    scaling = {
        key: value
        for key, value in given.items()
        if value is not None and (value or key not in _ZERO_IS_ABSENT)
    }
    if original is None or kind == "dynamic":  # dynamic scaling knows no other length
        original = longest
    if kind in ("yarn", "longrope"):
        scaling.setdefault("factor", longest / original)
    for key in _REQUIRED:
        field, expected = f"{config.where}: rope_parameters.{key}", f"a value with {kind}"
        expect(key in scaling or key not in _KEYS[kind], field, None, expected)
    if kind == "dynamic":  # the length in the file is where stretching begins, not where it ends
        out["max_seq_len"] = int(longest * scaling["factor"])
    out["rope_scaling"] = {"kind": kind, "original_max_seq_len": original, **scaling}
    return out


def rope_keys(args: ModelArgs) -> Keys:
    """Return the rotary settings of a model in both spellings.

    transformers 5 reads the first one, transformers 4 and most other tools read the other two.
    """
    scaling, kind = args.scaling, "default"
    rope: Keys = {}
    out: Keys = {}
    if args.rotary_fraction != 1.0:
        rope["partial_rotary_factor"] = args.rotary_fraction
    if scaling is not None:
        kind = scaling.kind
        given = write(scaling)
        rope |= {key: given[key] for key in _KEYS[kind] if given[key] is not None}
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
        if kind == "dynamic":
            out["max_position_embeddings"] = scaling.original_max_seq_len
    rope = {"rope_type": kind, **rope}
    return out | {
        "rope_parameters": {"rope_theta": args.rope_theta, **rope},
        "rope_theta": args.rope_theta,
        "rope_scaling": rope if scaling is not None else None,
    }


def check_whole_rotary(config: ForeignConfig, fields: Fields) -> Fields:
    """Return `fields` if whole heads rotate, else raise `RequestError`.

    Only Phi-3 rotates a part of each head. In other families transformers ignores the key or fails
    on it.
    """
    share = fields.get("rotary_fraction", 1.0)
    expect(share == 1.0, f"{config.where}: partial_rotary_factor", share, "1.0")
    return fields


ROPE = Option(
    lambda config: check_whole_rotary(config, rope_fields(config, rope_settings(config))), rope_keys
)

"""Hugging Face `config.json` to `ModelArgs`; both spellings (transformers 4 and 5). No torch."""

from __future__ import annotations

from typing import Any

from transom.base.errors import RequestError
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.hf_families import FAMILIES
from transom.config.model_args import HeadArgs, ModelArgs

# A base model, which its files keep without a head: vectors as its last norm leaves them.
BASE_HEAD = HeadArgs(kind="embedding", pooling="mean", normalize=False)


def args_from_hf(config: dict[str, Any], where: str) -> ModelArgs:
    """The model a Hugging Face config describes; a missing key, or a feature we lack, is a
    `RequestError`.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise RequestError(
            f"{where}: model_type: got {name!r}; expected transom, {', '.join(FAMILIES)}"
        )
    quantized = config.get("quantization_config")
    if quantized:
        kind = (
            quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        )
        raise RequestError(
            f"{where}: quantization_config: got {kind!r}; expected weights that are not quantized"
        )
    family = FAMILIES[name]
    reader = ForeignConfig(config, where, family.defaults)
    try:
        fields = family.fields(reader)
    except RequestError:
        raise
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as error:  # null or text where a number belongs
        raise RequestError(f"{where}: not a {name} config ({error})") from None
    try:
        args = ModelArgs.from_dict(fields)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    reader.say_unread()
    return args

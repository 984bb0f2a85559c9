"""What a family of foreign models is: the options of its config, each read and written side by
side. No torch.

`Family.read` and `Family.write` both follow from the same tuple of `Option`. The sources are
`configuration_*.py` and `modeling_*.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transom.base.errors import RequestError, expect
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.same_model import same_model
from transom.checkpoints.families.weights import WeightNames
from transom.config.layer_args import MoeArgs
from transom.config.model_args import ModelArgs

Fields = dict[str, Any]  # of ModelArgs, by dotted path: `moe_args.top_k`
Keys = dict[str, Any]  # of a config.json


def _no_keys(args: ModelArgs) -> Keys:
    return {}


@dataclass(frozen=True)
class Option:
    """One aspect of a family: `read` returns fields of a config, `write` the keys of a model's
    config.

    Both raise `RequestError` where they cannot express the other side.
    """

    read: Callable[[ForeignConfig], Fields]
    write: Callable[[ModelArgs], Keys] = _no_keys


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face, or the `params.json` of one maker.

    Attributes:
        model_type: the name in config.json.
        class_prefix: the beginning of the names of its classes: `Llama` in `LlamaForCausalLM`; ""
            for a params.json, which names none.
        names: how its files name the weights.
        options: how its config is read and written. Later options override earlier ones.
        defaults: what the config class has where a file does not name the key.
        writable: whether models are written as this family.
    """

    model_type: str
    class_prefix: str
    names: WeightNames
    options: tuple[Option, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    writable: bool = True

    def read(self, config: ForeignConfig) -> Fields:
        """Return the fields of the model that a config describes, by dotted path."""
        return read_all(self.options, config)

    def write(self, args: ModelArgs) -> Keys:
        """Return the config of a model; only reading it back shows whether it is the same model."""
        names = [f"{self.class_prefix}ForCausalLM"]
        named = {"architectures": names, "model_type": self.model_type} if self.class_prefix else {}
        return {**named, **write_all(self.options, args)}

    def args_from(self, config: ForeignConfig) -> ModelArgs:
        """Return the model that a config describes; raise `RequestError` if it is none."""
        return config.model(self.read, f"{self.model_type} config")

    def config_of(self, args: ModelArgs) -> Keys | None:
        """Return a config that reads back as a model, or None if the family cannot express it."""
        if not self.writable:
            return None
        try:
            config = self.write(args)
            again = self.args_from(ForeignConfig(config, self.model_type, self.defaults))
        except RequestError:
            return None
        # Interleaved weights may become halves: `save` permutes their rows, though not those of
        # latent attention.
        permuted = again.rope_layout == "halves" and args.mla_args is None
        expected = replace(args, rope_layout="halves") if permuted else args
        return config if same_model(again, expected) else None


def read_all(options: Iterable[Option], config: ForeignConfig) -> Fields:
    """Return the fields that options read; later ones override earlier ones."""
    return {path: value for option in options for path, value in option.read(config).items()}


def write_all(options: Iterable[Option], args: ModelArgs) -> Keys:
    """Return the keys that options write; later ones override earlier ones."""
    return {key: value for option in options for key, value in option.write(args).items()}


def resolved_experts(args: ModelArgs) -> MoeArgs:
    """Return the experts of a model with their width worked out; a model without them is a
    `RequestError`.
    """
    for layer in args.layers:
        if layer.moe is not None:
            return layer.moe
    raise RequestError("moe_args: got None; expected a mixture of experts")


def value_at(args: ModelArgs, path: str) -> Any:
    """Return the field at a dotted path; a part that the model does not have is a
    `RequestError`.
    """
    part, _, name = path.rpartition(".")
    if part == "moe_args":
        return getattr(resolved_experts(args), name)
    owner = getattr(args, part) if part else args
    expect(owner is not None, part, None, "a value")
    return getattr(owner, name)


def copied(**paths: str) -> Option:
    """Return an option for keys that hold the values of our fields.

    Args:
        paths: the dotted path of a field for each key, such as
            `swiglu_limit="moe_args.activation_limit"`. Reading a key that neither file nor class
            has is a `RequestError`.
    """
    return Option(
        lambda config: {path: config[key] for key, path in paths.items()},
        lambda args: {key: value_at(args, path) for key, path in paths.items()},
    )


def optional(*names: str) -> Option:
    """Return an option for keys that are fields of ours, written unless they have our default."""
    plain = ModelArgs()
    return Option(
        lambda config: {name: config.get(name, getattr(plain, name)) for name in names},
        lambda args: {
            name: getattr(args, name)
            for name in names
            if getattr(args, name) != getattr(plain, name)
        },
    )


def switches(**paths: str | tuple[str, ...]) -> Option:
    """Return an option for booleans.

    Args:
        paths: the field or fields of each key. A key that is null, or that neither file nor class
            has, means False.
    """
    each = {key: (path,) if isinstance(path, str) else path for key, path in paths.items()}
    return Option(
        lambda config: {
            path: config.get(key, False) for key, group in each.items() for path in group
        },
        lambda args: {key: value_at(args, group[0]) for key, group in each.items()},
    )


def fixed(**values: Any) -> Option:
    """Return an option for fields that have the same value in all models of the family.

    Args:
        values: the value of each field; `moe_args__routing` stands for the path `moe_args.routing`.
    """
    return Option(lambda config: {name.replace("__", "."): value for name, value in values.items()})


def _checked(
    check: Callable[[ForeignConfig, str, Any], object], values: Mapping[str, Any]
) -> Option:
    def read(config: ForeignConfig) -> Fields:
        for key, value in values.items():
            check(config, key, value)
        return {}

    return Option(read)


def only(**values: Any) -> Option:
    """Return an option that refuses all values of keys but one.

    Args:
        values: the supported value of each key, which is also its default.
    """
    return _checked(ForeignConfig.expect, values)


def ignored(*keys: str) -> Option:
    """Return an option for keys that transformers ignores in this family; one that is on is
    noted.
    """
    return _checked(lambda config, key, _: config.note_ignored(key), dict.fromkeys(keys))


def refused(**reasons: str) -> Option:
    """Return an option that refuses keys that are on, each for its reason."""
    return _checked(
        lambda config, key, reason: config.check(not config.get(key), key, f"none, as {reason}"),
        reasons,
    )


def redundant(*keys: str) -> Option:
    """Return an option for keys that repeat what other keys state."""
    return _checked(lambda config, key, _: config.get(key), dict.fromkeys(keys))

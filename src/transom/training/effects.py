"""Settings that have no effect together with others; they are refused, not ignored. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from transom.base.errors import RequestError
from transom.base.fields import write
from transom.training.config import TrainArgs
from transom.training.defaults import PACKABLE
from transom.training.finetune.args import PREFERENCES, FinetuneArgs

Condition = Callable[[TrainArgs], bool]


class Effect(NamedTuple):
    """Fields that have an effect only under a condition; `accepted` is that condition in words."""

    fields: tuple[str, ...]
    under: Condition
    accepted: str


def _objective(*names: str) -> tuple[Condition, str]:
    return (
        lambda args: args.finetune is None or args.finetune.objective in names,
        f"finetune.objective = {' or '.join(names)}",
    )


def _head_kind(args: TrainArgs) -> str | None:
    head = None if args.base is not None else args.model_args(vocab_size=None).head
    return None if head is None else head.kind


# Fields of one method or objective: a value that is not the default is a mistake, also in a config
# file.
OF_A_METHOD = (
    Effect(
        ("finetune.lora",),
        lambda args: args.finetune is None or args.finetune.method == "lora",
        "finetune.method = lora",
    ),
    Effect(("finetune.desirable_weight", "finetune.undesirable_weight"), *_objective("kto")),
    Effect(("finetune.alpha", "finetune.reverse"), *_objective("distill")),
    Effect(("finetune.temperature",), *_objective("distill", "grpo")),
    Effect(
        ("finetune.reward", "finetune.group", "finetune.answer_tokens", "finetune.scale_rewards"),
        *_objective("grpo"),
    ),
    Effect(("finetune.train_on",), *_objective("sft", "distill")),
    Effect(("finetune.truncate",), *_objective("sft", "distill", *PREFERENCES)),
)
# Fields that a switch turns off: a config file may keep their values, but the command line must not
# give them.
# `FinetuneArgs` itself checks `beta`, `label_smoothing`, `teacher` and `vocab_multiple`.
OF_A_SWITCH = (
    Effect(
        ("steps",),
        lambda args: args.finetune is None or args.finetune.epochs is None,
        "finetune.epochs = null",
    ),
    Effect(("finetune.scores",), lambda args: args.eval_every == 0, "eval_every = 0"),
    Effect(
        ("finetune.packing",),
        lambda args: (
            args.finetune is None
            or args.finetune.objective in PACKABLE
            or args.finetune.packing is False
        ),
        "finetune.objective = sft or distill",
    ),
    Effect(("short_rows_split",), lambda args: args.short_rows > 0, "short_rows above 0"),
    Effect(
        ("contrastive_temperature",),
        lambda args: (
            (args.base is not None and args.finetune is None) or _head_kind(args) == "embedding"
        ),
        "model.head of kind embedding",
    ),
    Effect(("loss_chunk",), lambda args: _head_kind(args) is None, "a model without a head"),
    Effect(
        ("sample_prompts", "sample_tokens"),
        lambda args: args.sample_every > 0,
        "sample_every above 0",
    ),
    Effect(
        ("eval_tokens",),
        lambda args: args.finetune is None and args.eval_every > 0,
        "eval_every above 0, without finetune",
    ),
    Effect(
        ("eval_every",),
        lambda args: args.eval_every == 0 or args.finetune is not None or args.data.held_out > 0,
        "data.held_out above 0",
    ),
    Effect(
        ("optimizer.muon_lr", "optimizer.muon_momentum", "optimizer.muon_steps"),
        lambda args: args.optimizer.name == "muon",
        "optimizer.name = muon",
    ),
    Effect(
        ("tokenizer.vocab_size",), lambda args: args.tokenizer.kind == "bpe", "tokenizer.kind = bpe"
    ),
    Effect(("schedule.decay",), lambda args: args.schedule.kind == "wsd", "schedule.kind = wsd"),
    Effect(
        ("schedule.final",),
        lambda args: args.schedule.kind != "constant",
        "schedule.kind = wsd, linear or cosine",
    ),
    Effect(
        ("data.cache_dir",),
        lambda args: args.finetune is None and _head_kind(args) is None,
        "plain text: other rows are not cached",
    ),
)


def check_effects(args: TrainArgs, words: Collection[str] = (), *, by_value: bool = True) -> None:
    """Refuse settings without an effect.

    A setting is refused where the command line names it with a value other than null: `words` are
    the fields that it gives, such as `finetune.lora.rank`. With `by_value`, a setting of another
    method or objective is also refused where its value is not the default; the config of a run that
    goes on may hold defaults of an earlier version.
    """
    data = write(args)
    for effect in (*OF_A_METHOD, *OF_A_SWITCH):
        if effect.under(args):
            continue
        for name in effect.fields:
            below = [word for word in words if word == name or word.startswith(f"{name}.")]
            named = [word for word in below if value_at(data, word) is not None]
            if by_value and not named and effect in OF_A_METHOD and args.finetune is not None:
                named = [field for field, _ in _set_fields(args.finetune, name)]
            if named:
                value = value_at(data, named[0])
                raise RequestError(
                    f"{named[0]}: got {value!r}; without an effect here; valid only with "
                    f"{effect.accepted}"
                )


def _set_fields(finetune: FinetuneArgs, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the fields at or below `name` that differ from their defaults."""
    before, now = {"finetune": write(FinetuneArgs())}, {"finetune": write(finetune)}
    pairs = [(name, value_at(before, name), value_at(now, name))]
    for field, default, value in pairs:
        if isinstance(default, dict):
            pairs += [(f"{field}.{key}", default[key], value[key]) for key in default]
        elif default != value:
            yield field, value


def value_at(data: Any, field: str) -> Any:
    """Return the value of a dotted field in plain data; None if there is none."""
    for key in field.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data

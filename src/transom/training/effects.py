"""Settings that have no effect together with other settings, which are refused. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from transom.base.errors import RequestError
from transom.base.fields import write
from transom.training.config import TrainArgs
from transom.training.defaults import PACKABLE
from transom.training.finetune.args import PREFERENCES, FinetuneArgs


class Effect(NamedTuple):
    """Fields that only have an effect under a condition.

    Attributes:
        fields: Names of the fields, separated by spaces.
        when: The condition.
        expected: The condition in words.
        by_value: Whether a config file is refused too if a value differs from its default. If not,
            the fields belong to a switch, and a file may keep their values while it is off.
    """

    fields: str
    when: Callable[[TrainArgs], bool]
    expected: str
    by_value: bool = False


def _with_objective(fields: str, *names: str) -> Effect:
    """Return fields that only have an effect with some objectives of fine-tuning."""

    def when(args: TrainArgs) -> bool:
        return args.finetune is None or args.finetune.objective in names

    return Effect(fields, when, f"finetune.objective = {' or '.join(names)}", by_value=True)


def _lora(args: TrainArgs) -> bool:
    return args.finetune is None or args.finetune.method == "lora"


def _packs(args: TrainArgs) -> bool:
    finetune = args.finetune
    return finetune is None or finetune.objective in PACKABLE or finetune.packing is False


def _head_kind(args: TrainArgs) -> str | None:
    head = None if args.base is not None else args.model_args(vocab_size=None).head
    return None if head is None else head.kind


def _embeds(args: TrainArgs) -> bool:
    return (args.base is not None and args.finetune is None) or _head_kind(args) == "embedding"


# `FinetuneArgs` checks `beta`, `label_smoothing`, `teacher` and `vocab_multiple` itself.
EFFECTS = (
    Effect("finetune.lora", _lora, "finetune.method = lora", by_value=True),
    _with_objective("finetune.desirable_weight finetune.undesirable_weight", "kto"),
    _with_objective("finetune.alpha finetune.reverse", "distill"),
    _with_objective("finetune.temperature", "distill", "grpo"),
    _with_objective("finetune.reward finetune.group", "grpo"),
    _with_objective("finetune.answer_tokens finetune.scale_rewards", "grpo"),
    _with_objective("finetune.train_on", "sft", "distill"),
    _with_objective("finetune.truncate", "sft", "distill", *PREFERENCES),
    Effect(
        "steps",
        lambda args: args.finetune is None or args.finetune.epochs is None,
        "finetune.epochs = null",
    ),
    Effect("finetune.scores", lambda args: args.eval_every == 0, "eval_every = 0"),
    Effect("finetune.packing", _packs, "finetune.objective = sft or distill"),
    Effect("short_rows_split", lambda args: args.short_rows > 0, "short_rows above 0"),
    Effect("contrastive_temperature", _embeds, "model.head of kind embedding"),
    Effect("loss_chunk", lambda args: _head_kind(args) is None, "a model without a head"),
    Effect(
        "sample_prompts sample_tokens", lambda args: args.sample_every > 0, "sample_every above 0"
    ),
    Effect(
        "eval_tokens",
        lambda args: args.finetune is None and args.eval_every > 0,
        "eval_every above 0, without finetune",
    ),
    Effect(
        "eval_every",
        lambda args: args.eval_every == 0 or args.finetune is not None or args.data.held_out > 0,
        "data.held_out above 0",
    ),
    Effect(
        "optimizer.muon_lr optimizer.muon_momentum optimizer.muon_steps",
        lambda args: args.optimizer.name == "muon",
        "optimizer.name = muon",
    ),
    Effect(
        "tokenizer.vocab_size", lambda args: args.tokenizer.kind == "bpe", "tokenizer.kind = bpe"
    ),
    Effect("schedule.decay", lambda args: args.schedule.kind == "wsd", "schedule.kind = wsd"),
    Effect(
        "schedule.final",
        lambda args: args.schedule.kind != "constant",
        "schedule.kind = wsd, linear or cosine",
    ),
    Effect(
        "data.cache_dir",
        lambda args: args.finetune is None and _head_kind(args) is None,
        "plain text: other rows are not cached",
    ),
)


def check_effects(args: TrainArgs, words: Collection[str] = (), *, by_value: bool = True) -> None:
    """Refuse settings that have no effect.

    Args:
        args: The config.
        words: The fields that a command line gives, such as `finetune.lora.rank`. One without an
            effect is refused, unless its value is null.
        by_value: Also refuse the values that differ from the default where `Effect.by_value` is
            set. A resumed run may have defaults of an earlier version.

    Raises:
        RequestError: If a setting has no effect. The message names the field and the condition.
    """
    data, defaults = write(args), {"finetune": write(FinetuneArgs())}
    changed = [field for field, *_ in differences(defaults, {"finetune": data["finetune"]})]
    for effect in EFFECTS:
        if effect.when(args):
            continue
        for name in effect.fields.split():
            given = [word for word in words if f"{word}.".startswith(f"{name}.")]
            named = [word for word in given if value_at(data, word) is not None]
            if by_value and not named and effect.by_value:
                named = [field for field in changed if f"{field}.".startswith(f"{name}.")]
            if named:
                value = value_at(data, named[0])
                what = f"got {value!r}, which has no effect"
                raise RequestError(f"{named[0]}: {what}; expected with {effect.expected}")


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield field, old and new value for every field at or below `name` in which data differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            field = f"{name}.{key}" if name else key
            yield from differences(before.get(key), now.get(key), field)
    elif before != now:
        yield name, before, now


def value_at(data: Any, field: str) -> Any:
    """Return the value of a dotted field in plain data; None if there is none."""
    for key in field.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data

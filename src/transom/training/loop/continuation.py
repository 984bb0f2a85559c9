"""Files that describe a run, and whether a config, its data and a machine may resume it.

`run.json` has the config twice: as it was given, which later configs are compared with, and as it
was resolved, with the values that follow from the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from transom.base.errors import RequestError, expect, notice
from transom.base.fields import read, write
from transom.base.files import read_json
from transom.base.processes import launch_id
from transom.base.runtime import DTYPES, dtype_name, machine
from transom.base.version import __version__
from transom.distributed.ranks import Ranks
from transom.planning.counts import parameters
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.effects import differences, value_at
from transom.training.loop.run_data import TOKENS
from transom.training.loop.run_folder import RunFolder
from transom.training.loop.trainer import Trainer

CONFIG, FACTS = "config.yaml", "run.json"
# Fields that may change when a run is resumed: the steps compute the same, up to rounding.
FREE_ON_RESUME = (
    "out",
    "data.cache_dir",
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep_last",
    "sample_every",
    "sample_prompts",
    "sample_tokens",
    "tensorboard",
    "dry_run",
    "activation_checkpoint",
    "activation_offload",
    "parallel",
    "finetune.scores",
)


class Change(NamedTuple):
    """A field whose value has changed since the run began."""

    field: str
    before: Any
    now: Any

    @property
    def is_free(self) -> bool:
        """Whether the run continues exactly in spite of the change."""
        return any(
            self.field == name or self.field.startswith(f"{name}.") for name in FREE_ON_RESUME
        )


def write_run(
    run: RunFolder, given: TrainArgs, trainer: Trainer, changes: Sequence[Change] | None
) -> None:
    """Write config.yaml and run.json, which describe the run.

    Args:
        run: The folder.
        given: The config as the user gave it.
        trainer: The trainer, with the resolved config.
        changes: How the config of a resumed run has changed, which is printed; None for a new run.
    """
    for change in changes or ():
        notice(f"{run.path}: {change.field}: {change.before!r} -> {change.now!r}")
    if changes is None:
        facts = {
            "transom": __version__,
            "machine": machine(),
            "launch": launch_id(),
            "device": trainer.device.type,
            "dtype": dtype_name(trainer.dtype),
            "parameters": parameters(trainer.model.args),
            "steps": trainer.args.steps,
            "seed": trainer.args.seed,
            "data": dict(trainer.data.hashes),
            "tokenizer": trainer.tokenizer.hash,
            "model": trainer.model.args.to_dict(),
        }
    elif changes:
        facts = read_json(run.path / FACTS)
    else:
        return
    config = given.to_dict()
    run.write_file(CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip())
    facts = {**facts, "config": config, "resolved": trainer.args.to_dict()}
    run.write_file(FACTS, json.dumps(facts, indent=2))


def begun_by_this_launch(run: Path) -> bool:
    """Return whether ranks of this launch, which has restarted them, have begun the run."""
    return (run / FACTS).exists() and read_json(run / FACTS).get("launch") == launch_id()


def changes_of(run: Path, args: TrainArgs) -> list[Change]:
    """Return how a config differs from that of a run.

    It is compared with run.json, since config.yaml may have been edited. A value that the config of
    the run left open may also be given as the value that was chosen for it.

    Raises:
        RequestError: If the run would compute something else with this config.
    """
    if not (run / FACTS).exists():
        raise RequestError(f"{run}: no {FACTS}; expected with --resume a folder that a run wrote")
    facts = read_json(run / FACTS)
    stored = write(read(TrainArgs, facts["config"]))
    changes = [
        change
        for change in starmap(Change, differences(stored, write(args)))
        if change.now != value_at(facts["resolved"], change.field)
    ]
    wrong = [
        f"its {change.field} is {change.before!r}, the config says {change.now!r}"
        for change in changes
        if not change.is_free
    ]
    if wrong:
        raise RequestError(f"{run}: belongs to another run: {'; '.join(wrong)}")
    return changes


def check_alike(ranks: Ranks, args: TrainArgs) -> None:
    """Refuse ranks that compute with different configs.

    Raises:
        RequestError: On every rank, with the first field in which a rank differs from rank 0.
    """
    first, *others = ranks.each(write(args))
    for rank, other in enumerate(others, 1):
        for one in starmap(Change, differences(first, other)):
            found = f"{one.before!r} on rank 0 and {one.now!r} on rank {rank}"
            if not one.is_free:
                raise RequestError(f"{one.field}: got {found}; expected the same on all ranks")


def as_begun(run: Path, args: TrainArgs) -> TrainArgs:
    """Return the config with the batch size, packing, epochs and date that the run began with."""
    resolved = read(TrainArgs, read_json(run / FACTS)["resolved"])
    args = replace(args, data=replace(args.data, batch_size=resolved.data.batch_size))
    if args.finetune is not None and resolved.finetune is not None:
        begun = {name: getattr(resolved.finetune, name) for name in ("packing", "epochs", "date")}
        args = replace(args, finetune=replace(args.finetune, **begun))
    return args


def check_same_machine(run: Path, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that the run began with, and print how this machine differs.

    A new measurement for `dtype: auto` must not change the dtype of a run.
    """
    facts, now = read_json(run / FACTS), machine()
    names = ("torch", "threads", "processor")
    pairs = {name: (facts["machine"][name], now[name]) for name in names}
    for what, (before, after) in ({"device": (facts["device"], device.type)} | pairs).items():
        if before != after:
            notice(f"{run}: {what} was {before}, is {after}: losses may differ in their last bits")
    return DTYPES.get(facts["dtype"], dtype)


def check_as_begun(
    run: Path, args: TrainArgs, data: Mapping[str, str], tokenizer: Tokenizer
) -> None:
    """Refuse changed data, where the run's position would be another place, and what follows.

    These are the numbers of steps and rows, and the tokenizer.
    """
    facts = read_json(run / FACTS)
    before = facts["data"]
    changed = [name for name in {**before, **data} if before.get(name) != data.get(name)]
    if changed:  # the tokens of all rows change with every source
        changed = [name for name in changed if name != TOKENS] or changed
        raise RequestError(
            f"{run}: {', '.join(changed)}: got changed data; expected the same, or a new run"
        )
    if facts["tokenizer"] != tokenizer.hash:
        raise RequestError(f"{run}: the tokenizer of its latest step is not the one it began with")
    for field, now in (("steps", args.steps), ("data.batch_size", args.data.batch_size)):
        begun = value_at(facts["resolved"], field)
        expect(now == begun, field, now, f"{begun}, as in the run {run}")

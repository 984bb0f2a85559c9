"""Several adapters on one model that is in memory, and the change from one to another without
loading anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transom.base.errors import notice, require
from transom.cli.main import user_path

if TYPE_CHECKING:
    from transom.checkpoints.files.location import ModelLocation
    from transom.models.llm import LLM

NONE = "none"


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """`--adapter NAME=FOLDER`, any number of times."""
    what = (
        "an adapter to have at hand under this name, its folder or a run of one; /adapter "
        "chooses; may be repeated"
    )
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help=what)


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Folders by name, in the order given."""
    out: dict[str, str] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        require(bool(name and equals and folder), "--adapter", one, "expected NAME=FOLDER")
        require(
            name != NONE and name not in out,
            "--adapter",
            one,
            f"expected a name of its own, and not {NONE}",
        )
        out[name] = user_path(folder)
    return out


def load_beside(model: LLM, found: ModelLocation, adapters: Mapping[str, str]) -> list[Path]:
    """Put adapters on the model and return their folders; the one that came with it, or none, stays
    in use.

    One that was trained on other weights is a `RequestError`; weights are looked at where another
    folder is named.
    """
    if not adapters:
        return []
    from transom.checkpoints.adapters.read import load_adapter
    from transom.checkpoints.fingerprint import check_base, read_facts
    from transom.checkpoints.merge import named_folders
    from transom.lora.adapters import activate_adapters, active_adapters, adapter_names

    in_use = active_adapters(model)
    _, folders = named_folders(found.model, list(adapters.values()))
    for name, folder in zip(adapters, folders, strict=True):
        facts = read_facts(folder)
        if facts is not None and Path(facts.base).resolve() != found.model.resolve():
            check_base(folder, found.model)
        load_adapter(model, folder, name)
    activate_adapters(model, in_use)
    chosen = ", ".join(in_use) or NONE
    notice(
        f"adapters: {', '.join(adapter_names(model))}; in use: {chosen}; /adapter NAME|{NONE} "
        f"changes it"
    )
    return [Path(folder) for folder in folders]


def switch(model: LLM, name: str) -> None:
    """Use this adapter alone from now on, or none; what was computed with another is the caller's
    to forget.
    """
    from transom.lora.adapters import activate_adapters, adapter_names

    names = adapter_names(model)
    expected = (
        f"expected {', '.join((*names, NONE))}"
        if names
        else "there is none; valid only with --adapter"
    )
    require(name in names or (name == NONE and bool(names)), "/adapter", name, expected)
    activate_adapters(model, () if name == NONE else (name,))
    notice(f"adapter in use: {name}", again=True)

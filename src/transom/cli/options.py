"""Command line options that several verbs share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from transom.base.errors import require
from transom.base.fields import field_types, options_of, read
from transom.checkpoints.files.hub import is_hub_id
from transom.checkpoints.files.location import find_model
from transom.cli.main import user_path

if TYPE_CHECKING:
    from transom.inference.weight_streaming import Offload

T = TypeVar("T")
MODEL = "a model or adapter folder of any format, a GGUF file, a run folder, a hub id, or smollm2"
KEPT = "keep weights in the codes of the files: less memory (default: all but those of GGUF files)"
DEVICES = "auto, cpu, cuda, cuda:N or mps"
DTYPES = "float32, bfloat16, float16 or float64"
ALIASES = {  # other names of flags
    "temperature": ("--temp",),
    "max_new_tokens": ("-m", "--max-tokens"),
    "group": ("--group-size",),
    "bits_budget": ("--target-bpw",),
}


def option(
    parser: argparse.ArgumentParser | argparse._MutuallyExclusiveGroup,
    usage: str,
    what: str,
    kind: Callable[[str], Any] = str,
    **more: Any,
) -> None:
    """Add an option or argument to a parser.

    Args:
        parser: The parser, or a group of options that exclude each other.
        usage: The names, then the word for the value: `-p --prompt TEXT`. A switch has no such
            word, and an argument nothing else; its name is that word in lower case.
        what: The help text.
        kind: What makes the value of its text.
        **more: Further arguments of `add_argument`; `dest` is also the name of an argument.
    """
    names = [name for name in usage.split() if name.startswith("-")]
    word = " ".join(usage.split()[len(names) :])
    if not word:
        parser.add_argument(*names, action="store_true", help=what, **more)
        return
    names = names or [more.pop("dest", word.lower())]
    parser.add_argument(*names, type=kind, metavar=word, help=what, **more)


def add_model(parser: argparse.ArgumentParser, what: str = MODEL) -> None:
    """Add the options that say which model is opened and where: those of `opening`."""
    option(parser, "FOLDER", what, user_path)
    add_opening(parser)


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model is opened."""
    add_revision(parser)
    option(parser, "--device DEVICE", f"{DEVICES} (default: auto)", default="auto")
    option(parser, "--dtype DTYPE", f"{DTYPES} (default: that of the files)")
    add_keep_quantized(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add `--revision`."""
    option(parser, "--revision REVISION", "branch, tag or commit of a hub id")


def add_keep_quantized(parser: argparse.ArgumentParser) -> None:
    """Add `--keep-quantized` and `--no-keep-quantized`."""
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--keep-quantized", action=switch, default=None, help=KEPT)


def check_model(name: str) -> None:
    """Raise a `RequestError` if a model can't be there, before torch is imported."""
    if not Path(name).exists() and not is_hub_id(name):
        find_model(name)  # raises; a hub id is looked up after everything else


def opening(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `open_model` that `add_model` and `add_offloading` added."""
    names = ("device", "dtype", "revision", "keep_quantized")
    given = {name: getattr(options, name) for name in names}
    return {"name": options.folder, **given, "offload": offloading(options)}


def add_offloading(parser: argparse.ArgumentParser) -> None:
    """Add the options of `offloading`, which `opening` reads too."""
    streams = "cpu or disk: stream the layers that do not fit into memory from there"
    option(parser, "--offload FROM", streams)
    most = "with --offload: memory to use, such as 6GiB (default: what is left)"
    option(parser, "--max-memory SIZE", most)


def require_unset(options: argparse.Namespace, unless: bool, where: str, *names: str) -> None:
    """Raise `RequestError` for the first of some options that is given, though nothing reads it.

    Args:
        options: The options of the command line.
        unless: Whether they are read.
        where: Where they are, as in `with --memory`.
        *names: Their names among the options.
    """
    for name in names:
        value = getattr(options, name)
        unset = value is False or value in (None, [])
        require(unless or unset, f"--{name.replace('_', '-')}", value, f"valid only {where}")


def offloading(options: argparse.Namespace, **more: int) -> Offload | None:
    """Return what the options ask for, with further arguments of `Offload`; None for nothing."""
    if options.offload is None:
        require_unset(options, False, "with --offload", "max_memory")
        return None
    from transom.inference.weight_streaming import Offload

    return Offload(options.offload, options.max_memory, **more)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    option(parser, "--json", "print one JSON document as the last line")


def add_fields(
    parser: argparse.ArgumentParser,
    cls: Any,
    only: Container[str] | None = None,
    **defaults: Any,
) -> None:
    """Add a flag for every field of a dataclass, or for some, with the field's help and default.

    The flag of a list may be repeated. `defaults` are those that differ from the fields'. A flag
    that is not given is None, if it is no switch and not one of `defaults`.
    """
    for field in dataclasses.fields(cls):
        if only is not None and field.name not in only:
            continue
        names = *ALIASES.get(field.name, ()), f"--{field.name.replace('_', '-')}"
        default, help = defaults.get(field.name, field.default), field.metadata["help"]
        if isinstance(default, bool):
            on = "store_true" if not default else argparse.BooleanOptionalAction
            parser.add_argument(*names, action=on, default=default, help=help)
            continue
        declared = options_of(field_types(cls)[field.name])[0]
        kind = declared if isinstance(declared, type) else str
        choices = get_args(declared) if get_origin(declared) is Literal else ()
        word = "FILE" if field.metadata["path"] else "TEXT"
        several = isinstance(default, tuple)
        words = " ".join(default) if several else default
        words = f"{words:g}" if isinstance(words, float | int) else words
        parser.add_argument(
            *names,
            dest=field.name,
            type=user_path if field.metadata["path"] else kind,
            default=defaults.get(field.name),
            action="append" if several else "store",
            metavar="|".join(choices) or {int: "N", str: word}.get(kind, "X"),
            help=help + ("" if default in (None, ()) else f" (default: {words})"),
        )


def read_fields(options: argparse.Namespace, cls: type[T]) -> T:
    """Return the dataclass from the flags that `add_fields` added for its fields, or for some.

    Raises:
        RequestError: A value is out of its bounds.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    given = {name: getattr(options, name, None) for name in names}
    return read(cls, {name: value for name, value in given.items() if value is not None})

"""Map the keys and tensors of files to Transom's names and back, with every key used exactly once.

The names are those of `checkpoints.families`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from transom.base.errors import RequestError, expect, notice, require
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.families.weights import WeightNames
from transom.checkpoints.files.file_pieces import FilePiece
from transom.checkpoints.files.layout import first_names
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors, TensorGroup
from transom.config.model_args import ModelArgs
from transom.names.tables import KeyMapping, Transform
from transom.names.transforms import Shape, apply_transform, invert_transform

# What torch raises if tensors cannot be cut or stacked as a mapping asks for.
_MISFITS = (RuntimeError, ValueError, IndexError)


def clean(family: str, source: LazyTensors, args: ModelArgs, where: str) -> dict[str, LazyTensor]:
    """Return the tensors of files under the keys of their family, without those that are not read.

    A notice tells how many are not read and why. A copy of tied embeddings is left out.

    Raises:
        RequestError: The output of a tied model differs from its embeddings.
    """
    names = WEIGHT_NAMES[family]
    out, unread = sort_keys(names, names.known_key, source, args.n_layers, where)
    tell_unread(unread, where)
    if args.tie_embeddings:
        drop_tied_output(names, out, where)
    return out


def drop_tied_output(
    names: WeightNames, source: dict[str, LazyTensor], where: str, own: Tensor | None = None
) -> None:
    """Remove the output of a model that ties it to its embeddings.

    Args:
        names: The names of the tensors.
        source: The tensors, changed in place.
        where: The folder or file, for messages.
        own: The embeddings where `source` has none, and the output where it must be theirs.

    Raises:
        RequestError: The output differs from the embeddings.
    """
    keys = names.key_of("output.weight"), names.key_of("tok_embeddings.weight")
    if own is None and keys[0] not in source:
        return
    found = [source[key].read() if key in source else own for key in keys]
    output, embeddings = (one if one is None or own is None else one.to(own) for one in found)
    same = output is not None and embeddings is not None and torch.equal(output, embeddings)
    expected = "it differs from the embeddings; expected none, as tie_word_embeddings is true"
    require(same, where, keys[0], expected)
    source.pop(keys[0], None)


def sort_keys(
    names: WeightNames,
    known_key: Callable[[str], str],
    source: LazyTensors,
    n_layers: int,
    where: str,
) -> tuple[dict[str, LazyTensor], Counter[str]]:
    """Return the tensors under the keys of their family, and how many are not read, by reason.

    Raises:
        RequestError: Two keys are spellings of one.
    """
    out, unread, spelled = dict[str, LazyTensor](), Counter[str](), dict[str, str]()
    for key, lazy in source.items():
        name = known_key(key)
        reason = names.unread_reason(name, n_layers)
        if reason is None:
            other = spelled.setdefault(name, key)
            expected = "one of them, as they are spellings of one key"
            expect(other == key, where, f"{other} and {key}", expected)
            out[name] = lazy
        else:
            unread[reason] += 1
    return out, unread


def tell_unread(unread: Mapping[str, int], where: str) -> None:
    """Print a notice for every reason why tensors are not read."""
    for reason, count in unread.items():
        notice(f"{where}: {count} tensors left unread: {reason}")


def to_ours(
    mappings: Iterable[KeyMapping], source: LazyTensors, shapes: Mapping[str, Shape], where: str
) -> dict[str, LazyTensor]:
    """Return our parameters from the tensors of files.

    Args:
        mappings: Names of files and ours. If several make the same parameter, the first whose keys
            are there is used. If none is, the keys of the first are reported as missing.
        source: The tensors of the files by their keys.
        shapes: The shape of every parameter.
        where: The folder, for messages.

    Raises:
        RequestError: Keys are missing or left over, or shapes do not fit. All are in one message.
    """
    out: dict[str, LazyTensor] = {}
    used: set[str] = set()
    sought: dict[str, Sequence[str]] = {}  # parameter -> the keys that it is made of and that lack
    misfits: list[str] = []
    for mapping in mappings:
        absent = [key for key in mapping.foreign if key not in source]
        if absent or any(name in out for name in mapping.ours):
            for name in mapping.ours:
                sought.setdefault(name, absent)
            continue
        used.update(mapping.foreign)
        parts = [source[key] for key in mapping.foreign]
        made = _make(mapping, parts, [shapes[name] for name in mapping.ours])
        if made is None:
            found = ", ".join(sorted({str(part.shape) for part in parts}))
            needed = ", ".join(f"{name} {shapes[name]}" for name in mapping.ours)
            misfits.append(f"{mapping.foreign[0]} has shape {found}, which does not make {needed}")
            made = [LazyTensor.of(torch.empty(shapes[n], device="meta")) for n in mapping.ours]
        out.update(zip(mapping.ours, made, strict=True))
    unfilled = [name for name in shapes if name not in out]
    missing = list(dict.fromkeys(key for name in unfilled for key in sought.get(name, ())))
    unnamed = [name for name in unfilled if name not in sought]
    left_over = sorted(source.keys() - used)
    lists = {"missing ": missing, "left over ": left_over, "nothing for ": unnamed, "": misfits}
    account(where, lists)
    return out


def _make(
    mapping: KeyMapping, parts: Sequence[LazyTensor], shapes: Sequence[Shape]
) -> list[LazyTensor] | None:
    """Return the parameters that a mapping makes, or None if they have other shapes."""

    def part(index: int) -> LazyTensor:
        made = LazyTensor.made_of(
            parts, lambda tensors: apply_transform(mapping.transform, tensors, shapes)[index]
        )
        return replace(made, pieces=_pieces(mapping.transform, parts, shapes, index))

    try:
        made = [part(index) for index in range(len(shapes))]
    except _MISFITS:
        return None
    return made if [one.shape for one in made] == [tuple(shape) for shape in shapes] else None


def _pieces(
    transform: Transform, parts: Sequence[LazyTensor], shapes: Sequence[Shape], index: int
) -> tuple[FilePiece, ...]:
    """Return the places of the bytes of a parameter, if it has the bytes of tensors of files."""
    if transform == "copy":
        return parts[index].pieces
    if transform == "stack" and all(part.pieces for part in parts):
        return tuple(piece for part in parts for piece in part.pieces)
    if transform == "rows" and len(parts[0].pieces) == 1 and len(shapes[index]) <= 2:
        (file, start, _), size = parts[0].pieces[0], parts[0].dtype.itemsize
        before = sum(map(math.prod, shapes[:index]))
        return (FilePiece(file, start + before * size, math.prod(shapes[index]) * size),)
    return ()


def to_foreign(mappings: Iterable[KeyMapping], ours: LazyTensors, where: str) -> list[TensorGroup]:
    """Return the tensors of files from our parameters, one group per mapping.

    Raises:
        RequestError: No mapping writes some parameter.
    """
    out: list[TensorGroup] = []
    written: set[str] = set()
    for mapping in mappings:
        written.update(mapping.ours)
        metas = invert_transform(mapping.transform, [ours[name].meta for name in mapping.ours])
        out.append(TensorGroup(mapping.foreign, metas, _writer(mapping, ours)))
    account(where, {"nothing for ": sorted(ours.keys() - written)})
    return out


def _writer(mapping: KeyMapping, ours: LazyTensors) -> Callable[[], list[Tensor]]:
    return lambda: invert_transform(mapping.transform, [ours[name].read() for name in mapping.ours])


def account(where: str, found: Mapping[str, Sequence[str]]) -> None:
    """Raise `RequestError` unless all lists of keys and parameters are empty.

    The message has the words for each list and its first names.
    """
    problems = [f"{what}{first_names(names, 5)}" for what, names in found.items() if names]
    if problems:
        raise RequestError(f"{where}: keys do not add up: {'; '.join(problems)}")

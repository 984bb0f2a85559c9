"""Foreign tensors to ours and back, by the rows of `names.py`, with every key consumed exactly once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from transom.errors import RequestError
from transom.names import Move


def to_ours(
    moves: Iterable[Move], source: Mapping[str, Tensor], parameters: Collection[str], where: str
) -> dict[str, Tensor]:
    """Our state from a foreign one; a key left over or a parameter left empty is a `RequestError` listing them."""
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    for move in moves:
        absent = [key for key in move.foreign if key not in source]
        missing += absent
        if absent:
            continue
        used.update(move.foreign)
        out.update(zip(move.ours, _import(move, [source[key] for key in move.foreign]), strict=True))
    left_over = sorted(set(source) - used)
    unfilled = sorted(set(parameters) - set(out)) if not missing else []
    account(where, missing, left_over, unfilled)
    return out


def to_foreign(moves: Iterable[Move], ours: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The foreign state of ours; one of our parameters that no row writes is a `RequestError`."""
    out: dict[str, Tensor] = {}
    written: set[str] = set()
    for move in moves:
        written.update(move.ours)
        out.update(zip(move.foreign, _export(move, [ours[name] for name in move.ours]), strict=True))
    account(where, [], [], sorted(set(ours) - written))
    return out


def account(where: str, missing: list[str], left_over: list[str], unfilled: list[str]) -> None:
    """Raise one sentence that lists what does not add up."""
    problems = [
        f"{what} {_few(names)}"
        for what, names in (("missing", missing), ("left over", left_over), ("nothing for", unfilled))
        if names
    ]
    if problems:
        raise RequestError(f"{where}: keys do not add up: {'; '.join(problems)}")


def _few(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _import(move: Move, tensors: list[Tensor]) -> list[Tensor]:
    match move.transform:
        case "copy":
            return tensors
        case "stack":
            return [torch.stack(tensors)]
        case "transpose":
            return [tensors[0].mT]
        case "halves":
            gate, value = tensors[0].mT.chunk(2, dim=1)
            return [gate, value]


def _export(move: Move, tensors: list[Tensor]) -> list[Tensor]:
    match move.transform:
        case "copy":
            return tensors
        case "stack":
            return list(tensors[0].unbind(0))
        case "transpose":
            return [tensors[0].mT]
        case "halves":
            return [torch.cat(tensors, 1).mT]

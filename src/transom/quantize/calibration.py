"""Inputs of the leaves on calibration text, one block of the model after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, WorkError, expect
from transom.base.runtime import evaluating
from transom.layers.inputs import TransformerInput
from transom.layers.linear import Embedding, GroupedLinear, Linear
from transom.models.build_step import build_step
from transom.models.llm import LLM

Dense = Linear | GroupedLinear | Embedding


@dataclass(frozen=True)
class InputStatistics:
    """Sums over the rows that a leaf multiplied, of E leaves side by side or of one (E = 1).

    Attributes:
        hessians: The sum of x x^T, float32 [E, in, in].
        sizes: The sum of |x|, float32 [E, in].
        rows: Number of rows, int64 [E].
    """

    hessians: Tensor
    sizes: Tensor
    rows: Tensor

    def add(self, x: Tensor, ends: Sequence[int]) -> None:
        """Add rows x [R, in], of which those of leaf e end at `ends[e]`."""
        for e, (start, end) in enumerate(itertools.pairwise((0, *ends))):
            rows = x[start:end].float()
            self.hessians[e].addmm_(rows.T, rows)
            self.sizes[e] += rows.abs().sum(0)
            self.rows[e] += len(rows)


class _Watch:
    """Collects the inputs of leaves. Leaves that read one tensor share one set of sums."""

    def __init__(self, leaves: Mapping[str, Dense]) -> None:
        self.found: dict[str, InputStatistics] = {}
        self._last: tuple[str, Tensor | None] = "", None
        self._hooks = [
            leaf.register_forward_pre_hook(lambda _, given, path=path: self.see(path, *given))
            for path, leaf in leaves.items()
        ]

    def see(self, path: str, x: Tensor, ends: Tensor | None = None) -> None:
        """Add the input of a call of a leaf."""
        name, last = self._last
        if x is last:
            self.found[path] = self.found[name]
            return
        self._last = path, x
        flat = x.flatten(0, -2)
        bounds = [len(flat)] if ends is None else ends.tolist()
        if path not in self.found:
            count, inputs = len(bounds), x.size(-1)
            hessians = torch.zeros(count, inputs, inputs, device=x.device)
            rows = torch.zeros(count, dtype=torch.int64, device=x.device)
            self.found[path] = InputStatistics(hessians, torch.zeros_like(hessians[:, 0]), rows)
        self.found[path].add(flat, bounds)

    def close(self) -> dict[str, InputStatistics]:
        """Stop watching, and return the sums by the name of the leaf.

        Raises:
            WorkError: An input was NaN or infinite.
        """
        for hook in self._hooks:
            hook.remove()
        for path, sums in self.found.items():
            if not bool(sums.sizes.isfinite().all()):
                raise WorkError(f"{path}: got NaN or infinite inputs from the calibration text")
        return self.found


def checked_batches(
    model: LLM, batches: Iterable[Tensor] | None, leaves: Mapping[str, Dense]
) -> list[Tensor]:
    """Return the batches as a list.

    Raises:
        RequestError: There are none, or fewer tokens than the most inputs of a leaf; or an id is
            none of the model, such as that of padding.
    """
    made = list(batches or ())
    path, leaf = max(leaves.items(), key=lambda item: item[1].weight.size(-1))
    tokens, least = sum(one.numel() for one in made), leaf.weight.size(-1)
    if tokens < least:
        expected = f"expected at least {least:,}, as many as {path} has inputs"
        raise RequestError(f"batches: got {tokens:,} tokens of calibration text; {expected}")
    last = model.args.vocab_size - 1
    ids = [int(one) for one in torch.cat([one.flatten() for one in made]).aminmax()]
    expect(ids[0] >= 0 and ids[1] <= last, "batches", ids, f"ids from 0 to {last}")
    return made


@torch.no_grad()
def block_inputs(
    model: LLM, batches: Sequence[Tensor], leaves: Mapping[str, Dense]
) -> Iterator[tuple[nn.Module, dict[str, Dense], dict[str, InputStatistics]]]:
    """Yield each part of the model, its leaves, and the sums of their inputs.

    The parts are the blocks and the output. If the caller changes a part before it asks for the
    next one, the inputs of later parts are those of the changed model. Memory has the hidden states
    of all batches and the sums of one part.

    Args:
        model: The model.
        batches: Token ids [B, T] on any device, without padding.
        leaves: The leaves to watch, by name. Those that no token reaches have no sums.

    Raises:
        RequestError: The model can't compute the tokens.
        WorkError: An input of a leaf is NaN or infinite.
    """
    inputs = [TransformerInput(one.to(model.device), logits="none") for one in batches]
    with evaluating(model):
        steps = [build_step(model.args, one, None, model.attend) for one in inputs]
        states = [model.embed(one) for one in inputs]
        for index, block in enumerate(model.layers):
            inside = f"layers.{index}."
            own = {path: leaf for path, leaf in leaves.items() if path.startswith(inside)}
            if own:
                watch = _Watch(own)
                for state, step in zip(states, steps, strict=True):
                    block(state, step)
                yield block, own, watch.close()
            for at, step in enumerate(steps):
                states[at] = block(states[at], step)[0]
        rest = {path: leaf for path, leaf in leaves.items() if not path.startswith("layers.")}
        watch = _Watch(rest)
        output = "tok_embeddings" if model.output is None else "output"
        if output in rest and model.args.head is None:
            for state in states:
                watch.see(output, model.norm(state))
        yield model, rest, watch.close()

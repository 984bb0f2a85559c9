"""The checks of `transom verify` by name, and `run`, which runs one of them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transom.base.errors import expect, nearest, require

if TYPE_CHECKING:
    from transom.verify.findings import Finding


@dataclass(frozen=True)
class Check:
    """One check. Its comparisons are made by the function `check` of `transom.verify.NAME`.

    Attributes:
        name: The name on the command line.
        compares: What is compared with what.
        options: The keyword arguments of `check`. The value names an option that must be given
            too; it is empty if there is none.
        full_size: Whether a given model is run as it is, with all threads, and not as a small copy.
    """

    name: str
    compares: str
    options: Mapping[str, str] = field(default_factory=dict)
    full_size: bool = False

    def usage(self, option: str) -> str:
        """Return the shortest command line that accepts an option."""
        needs = {"": "", "model": " MODEL", "full": " MODEL --full"}[self.options[option]]
        return f"`verify {self.name}{needs}`"


CHECKS = {
    check.name: check
    for check in (
        Check(
            "model",
            "logits and gradients against a second implementation in float64",
            {"model": ""},
        ),
        Check(
            "cache",
            "cached, chunked, rotating, padded and packed calls against one full forward",
            {
                "model": "",
                "full": "model",
                "length": "full",
                "dtype": "full",
                "device": "full",
                "tokens": "",
            },
        ),
        Check(
            "checkpoint",
            "a folder against its own files, the folders written from it and transformers",
            {"model": "", "length": "model", "dtype": "model"},
            full_size=True,
        ),
        Check(
            "merge",
            "merged weights against adapters beside their base, in memory and in folders",
            {"model": "", "adapter": "model"},
            full_size=True,
        ),
        Check(
            "policy",
            "log-probabilities of sampling against those of training on the same tokens",
            {"model": "", "device": ""},
            full_size=True,
        ),
        Check(
            "finetune",
            "loss masks, trained weights, gradients, resumed runs and the frozen base",
            {"model": "", "data": "model"},
            full_size=True,
        ),
        Check("resume", "interrupted runs against one without", {"model": "", "steps": ""}),
        Check("step", "a training step in micro-batches against the step in one batch"),
        Check("parallel", "training steps on four ranks against the same steps in one process"),
        Check("data", "packed rows and targets against the documents that they come from"),
        Check(
            "quantize",
            "codes, products, logits and folders of quantized weights against float64 twins",
            {"model": ""},
            full_size=True,
        ),
        Check("ops", "products and blocks of few rows in C++ against the same in PyTorch"),
        Check(
            "memory",
            "bytes that `inspect --memory` plans against those of models that generate",
            {"model": ""},
            full_size=True,
        ),
        Check(
            "export",
            "programs of torch.export against the model that they were made of",
            {"model": ""},
            full_size=True,
        ),
        Check("attention", "attention backends against the float64 reference", {"device": ""}),
    )
}


def valid_with(option: str) -> str:
    """Return the commands that accept an option, for help texts and refusals."""
    return ", ".join(check.usage(option) for check in CHECKS.values() if option in check.options)


def run(name: str, **options: Any) -> Iterator[Finding]:
    """Run one check and yield its comparisons as they are made.

    The options are validated at once, the work begins with the first comparison.

    Args:
        name: One of `CHECKS`.
        **options: The options of the check. None and False count as not given.

    Raises:
        RequestError: If there is no such check, or if an option does not belong to it.
    """
    expected = f"one of {', '.join(CHECKS)}{nearest(str(name), CHECKS)}"
    expect(name in CHECKS, "verify", name, expected)
    check = CHECKS[name]
    given = {key: value for key, value in options.items() if value not in (None, False)}
    for option, value in given.items():
        flag = option if option in ("model", "adapter") else f"--{option}"
        valid = option in check.options and check.options[option] in ("", *given)
        require(valid, flag, value, f"valid only with {valid_with(option)}")
    return _findings(check, given)


def _findings(check: Check, given: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the comparisons of a check; small models run on one thread, which is faster."""
    from transom.base.runtime import one_thread

    full = "full" in given or (check.full_size and "model" in given)
    with contextlib.nullcontext() if full else one_thread():
        yield from importlib.import_module(f"transom.verify.{check.name}").check(**given)

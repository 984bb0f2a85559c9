"""Which folder a person means: a model folder, or a run folder standing for one of its steps. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from transom.args import ModelArgs
from transom.errors import RequestError, notice

MODEL_TYPE = "transom"
CHECKSUMS = "sha256.json"


def model_folder(path: str | Path, which: Literal["best", "latest"] = "best") -> Path:
    """The model folder meant by `path`; for a run folder its `best` (or `latest`) step, and says so on stderr."""
    folder = Path(path)
    if not folder.exists():
        raise RequestError(f"{folder}: no such folder; accepted is a model or run folder")
    if not folder.is_dir():
        raise RequestError(f"{folder}: a file; accepted is a model or run folder")
    if (folder / "config.json").exists():
        return folder
    for pointer in (which, "latest"):
        step = read_pointer(folder, pointer)
        if step is not None:
            notice(f"{folder}: using {pointer} step {step.name}")
            return step
    raise RequestError(f"{folder}: no config.json and no finished step; accepted is a model or run folder")


def read_pointer(run: Path, name: str) -> Path | None:
    """The step folder that the one-line file `latest` or `best` of a run names, or None when there is none."""
    pointer = run / name
    if not pointer.exists():
        return None
    step = run / pointer.read_text(encoding="utf-8").strip()
    if not (step / "config.json").exists():
        raise RequestError(
            f"{pointer}: names {step.name!r}, which is not a model folder; remove the line or restore it"
        )
    return step


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(step: Path) -> None:
    """Refuse a step folder of which a file is missing, cut or altered since it was written."""
    again = f"remove {step.name} and point `latest` and `best` to another step"
    for name, expected in read_json(step / CHECKSUMS).items():
        if not (step / name).exists():
            raise RequestError(f"{step / name}: missing; {again}")
        if sha256_of(step / name) != expected:
            raise RequestError(f"{step / name}: altered or cut since it was written (sha256 differs); {again}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else is a `RequestError` naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise RequestError(f"{path}: accepted is one JSON object")
    return data


def read_args(folder: Path) -> ModelArgs:
    """The model arguments of a native or Hugging Face folder."""
    config = read_json(folder / "config.json")
    if config.get("model_type") == MODEL_TYPE:
        return ModelArgs.from_dict({k: v for k, v in config.items() if k not in ("model_type", "architectures")})
    from transom.checkpoints.hf_config import args_from_hf

    return args_from_hf(config, str(folder / "config.json"))

"""Which folder a person means, and of which format its files are: native, Hugging Face's, Meta's or
Mistral's.

Nothing is guessed from names that people choose; a run folder stands for one of its steps. No
torch.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transom.base.errors import RequestError, notice
from transom.base.files import read_json, refuse_infinite, safetensors_header
from transom.checkpoints.adapters.peft_config import CONFIG as ADAPTER
from transom.checkpoints.adapters.peft_config import WEIGHTS as ADAPTER_WEIGHTS
from transom.checkpoints.adapters.peft_config import (
    base_of,
    base_revision,
    is_adapter,
    trained_vocabulary,
)
from transom.checkpoints.files.hub import download, is_hub_id
from transom.checkpoints.files.pooling import POOLING
from transom.checkpoints.files.weight_files import WEIGHTS, find_weights
from transom.config.model_args import ModelArgs

MODEL_TYPE = "transom"
CHECKSUMS = "sha256.json"
# What a step folder holds for the run to go on, beside the model or adapter.
TRAINER_FILES = TRAINER_STATE, TRAINER_TENSORS = "trainer.json", "trainer.safetensors"
CONFIG, PARAMS = "config.json", "params.json"
SAFE, PICKLED = "consolidated.safetensors", "consolidated.{rank:02d}.pth"
TOKENIZERS = ("tokenizer.json", "tekken*.json", "*.model.v*", "tokenizer.model")

Format = Literal["native", "hf", "meta", "mistral"]
Which = Literal["best", "latest"]


def model_folder(path: str | Path, which: Which = "best", revision: str | None = None) -> Path:
    """The folder of a whole model meant by `path`; for a run folder its `best` (or `latest`) step,
    and says so.

    What is no path and looks like `owner/model` is a hub id, at `revision` where one is given; not
    so below a folder that is there, since a mistyped path is no business of a hub's.
    """
    folder = named_folder(path, which, revision)
    if is_adapter(folder):
        raise RequestError(f"{folder}: an adapter; expected a whole model, such as this one merged")
    return folder


def named_folder(
    path: str | Path, which: Which, revision: str | None, settings_only: bool = False
) -> Path:
    """Return `model_folder`, whose folder may also be that of an adapter.

    With `settings_only`, a folder with a tokenizer and no model is accepted as well.
    """
    folder = Path(path)
    if not folder.exists() and not folder.parent.exists() and is_hub_id(str(path)):
        fetched = download(str(path), revision, settings_only=settings_only)
        return named_folder(fetched, which, None, settings_only)
    if revision is not None:
        raise RequestError(
            f"revision: got {revision!r}; valid only with a hub id, and {path} is not one"
        )
    if not folder.exists():
        raise RequestError(
            f"{folder}: no such folder; expected a model, adapter or run folder, or a hub id"
        )
    if not folder.is_dir():
        raise RequestError(f"{folder}: a file; expected a model, adapter or run folder")
    if is_model(folder):
        return folder
    for pointer in (which, "latest"):
        step = read_pointer(folder, pointer)
        if step is not None:
            notice(f"{folder}: using {pointer} step {step.name}")
            return step
    if settings_only and holds_tokenizer(folder):
        return folder
    inside = next((p for p in ("original",) if (folder / p / PARAMS).exists()), None)
    hint = f", as {folder / inside} is" if inside else ""
    also = ", or one with tokenizer.json, tekken.json or tokenizer.model" if settings_only else ""
    raise RequestError(
        f"{folder}: no {CONFIG}, no {PARAMS}, no {ADAPTER} and no finished step; expected a "
        f"model, adapter or run folder{also}{hint}"
    )


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the file of a tokenizer."""
    return any(any(folder.glob(name)) for name in TOKENIZERS)


def is_model(folder: Path) -> bool:
    """Whether a folder says what model or adapter it holds."""
    return any((folder / name).exists() for name in (CONFIG, PARAMS, ADAPTER))


@dataclass(frozen=True)
class Found:
    """What a name resolves to: a model folder, and the adapter folder to apply to it, if any.

    Where only the tokenizer was asked for, the folder may hold no model, and the name may be that
    of a tokenizer's file, `tokenizer_file`.
    """

    model: Path
    adapter: Path | None = None
    tokenizer_file: Path | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where to look for what goes along with the weights: the adapter's folder comes first."""
        return (self.model,) if self.adapter is None else (self.adapter, self.model)

    @property
    def tokenizer(self) -> Path:
        """The folder or file of the tokenizer."""
        return self.tokenizer_file or next(filter(holds_tokenizer, self.folders), self.model)

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embeddings, those of the adapter where it has some of its own; None where
        nothing tells.

        Where no config states them, they are read from the weights or the defaults of the config's
        class.
        """
        own = None if self.adapter is None else trained_vocabulary(self.adapter)
        stated = own or stated_vocabulary(self.model)
        if stated is not None or not is_model(self.model) or lacks_vocabulary(self.model):
            return stated
        with contextlib.suppress(RequestError):  # a tokenizer opens beside a model that does not
            return read_args(self.model).vocab_size
        return None

    def __str__(self) -> str:
        return str(self.model) if self.adapter is None else f"{self.model} + adapter {self.adapter}"


def find_model(
    name: str | Path, revision: str | None = None, *, settings_only: bool = False
) -> Found:
    """What a name stands for: `model_folder`, and for an adapter its base's, which must be a whole
    model.

    `settings_only` fetches no weights of a hub id, which config, tokenizer and chat template do
    without.
    """
    if settings_only and revision is None and Path(name).is_file():
        return Found(Path(name).parent, tokenizer_file=Path(name))
    folder = named_folder(name, "best", revision, settings_only)
    if not is_adapter(folder):
        return Found(folder)
    base = base_of(folder)
    try:
        of_base = None if Path(base).exists() else base_revision(folder)
        model = named_folder(base, "best", of_base, settings_only)
    except RequestError as error:
        raise RequestError(f"{folder / ADAPTER}: base_model_name_or_path: {error}") from None
    if is_adapter(model):
        raise RequestError(
            f"{folder / ADAPTER}: the base {base} is an adapter too; expected a whole model"
        )
    return Found(model, folder)


def folder_format(folder: Path) -> Format:
    """Return whose layout a model folder has, judged by its files; of two, the one with weights."""
    config, params = (folder / CONFIG).exists(), (folder / PARAMS).exists()
    if not config and not params:
        raise RequestError(f"{folder}: no config.json and no params.json; expected a model folder")
    if config and params and consolidated_files(folder):
        config = any(folder.glob("model*.safetensors"))
    if config:
        return "native" if read_json(folder / CONFIG).get("model_type") == MODEL_TYPE else "hf"
    # Mistral's code requires the width that Meta's derives by a rule.
    return "mistral" if "hidden_dim" in read_params(folder) else "meta"


def consolidated_files(folder: Path) -> list[Path]:
    """Weights as Meta and Mistral name them: safetensors first, else one .pth per rank, in their
    order.
    """
    safe = [path for path in (folder / SAFE, folder / f"{SAFE}.index.json") if path.exists()]
    return safe or sorted(
        path for path in folder.glob("consolidated.*.pth") if path.name.split(".")[1].isdigit()
    )


def read_params(folder: Path) -> dict[str, Any]:
    """params.json, of which some files nest everything under `model`."""
    params = read_json(folder / PARAMS)
    inner = params.get("model")
    return inner if isinstance(inner, dict) else params


def read_pointer(run: Path, name: str) -> Path | None:
    """The step folder that the one-line file `latest` or `best` of a run names, or None when there
    is none.

    A step is a model folder, or an adapter folder where only an adapter was trained.
    """
    pointer = run / name
    if not pointer.exists():
        return None
    step = run / pointer.read_text(encoding="utf-8").strip()
    if not is_model(step):
        raise RequestError(
            f"{pointer}: names {step.name!r}, which is not a model or adapter folder; delete "
            f"{pointer.name!r} or restore the folder"
        )
    return step


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(step: Path, *, trainer: bool = True) -> None:
    """Refuse a step folder of which a file is missing, cut or altered since it was written.

    Without `trainer`, the state of the trainer is left out, which is most of a step and which no
    model reads.
    """
    again = f"remove {step.name} and point `latest` and `best` to another step"
    sums = read_json(step / CHECKSUMS)
    for name, expected in sums.items():
        if not trainer and name in TRAINER_FILES:
            continue
        if not (step / name).exists():
            raise RequestError(f"{step / name}: missing; {again}")
        if sha256_of(step / name) != expected:
            raise RequestError(
                f"{step / name}: altered or cut since it was written (sha256 differs); {again}"
            )
    for path in files_read(step)[1:]:  # weights that would be read in place of the run's
        if path.name not in sums:
            raise RequestError(f"{path}: added since the step was written; {again}")


def verify_step(folder: Path) -> None:
    """Call `verify_checksums` on the part of a step folder that models are made of; other folders
    pass.
    """
    if (folder / CHECKSUMS).exists():
        verify_checksums(folder, trainer=False)


def files_read(folder: Path) -> list[Path]:
    """Return the config and the files of weights that the loading of a model or adapter reads."""
    if is_adapter(folder):
        return [folder / ADAPTER, folder / ADAPTER_WEIGHTS]
    kind = folder_format(folder)
    hugging_face = kind in ("native", "hf")
    config = folder / (CONFIG if hugging_face else PARAMS)
    if not hugging_face and not any(SAFE in path.name for path in consolidated_files(folder)):
        return [config, *consolidated_files(folder)]
    own = read_json(config) if kind == "hf" else None
    taken = find_weights(folder, WEIGHTS if hugging_face else SAFE, own)
    names = [*([taken.index] if taken.index is not None else []), *taken.files]
    return [config, *(folder / name for name in names)]


def read_args(folder: Path) -> ModelArgs:
    """Return the model arguments of a folder of any format; print a notice if it has two
    configs.
    """
    kind = folder_format(folder)
    if (folder / CONFIG).exists() and (folder / PARAMS).exists():
        read, other = (CONFIG, PARAMS) if kind in ("native", "hf") else (PARAMS, CONFIG)
        notice(f"{folder}: two configs; {read} is read, {other} is ignored")
    match kind:
        case "native":
            config = read_json(folder / CONFIG)
            refuse_infinite(config, str(folder / CONFIG))
            own = {
                key: value
                for key, value in config.items()
                if key not in ("model_type", "architectures")
            }
            return ModelArgs.from_dict(own)
        case "hf":
            from transom.checkpoints.families.hf import args_from_hf

            config = read_json(folder / CONFIG)
            return _without_head(folder, config, args_from_hf(config, str(folder / CONFIG)))
        case "mistral":
            from transom.checkpoints.families.mistral_params import args_from_mistral

            return args_from_mistral(read_params(folder), str(folder / PARAMS))
        case "meta":
            return _read_meta(folder)


def _without_head(folder: Path, config: Mapping[str, Any], args: ModelArgs) -> ModelArgs:
    """Return `args` of a model without an output matrix, if `folder` is that of a base model alone.

    Its config names the class of a base (`LlamaModel`), or the folder says how to pool tokens. In
    any other folder the lack of the matrix is a damaged checkpoint, which the reading of the
    weights refuses.
    """
    classes = config.get("architectures") or []
    of_base = bool(classes) and all(str(name).endswith("Model") for name in classes)
    if args.tie_embeddings or not (of_base or (folder / POOLING).exists()):
        return args
    if any(key.endswith("lm_head.weight") for key in _stored_keys(folder, config)):
        return args
    from transom.config.layer_args import BASE_HEAD

    notice(
        f"{folder}: a base model without lm_head.weight: it gives embeddings and cannot generate"
    )
    return replace(args, head=BASE_HEAD)


def _stored_keys(folder: Path, config: Mapping[str, Any]) -> set[str]:
    """Return the keys of weights in Hugging Face's layout, none without readable files."""
    keys: set[str] = set()
    with contextlib.suppress(
        RequestError
    ):  # whoever reads the weights says what is wrong with them
        for file in find_weights(folder, WEIGHTS, config).files:
            keys |= (safetensors_header(folder / file) or {}).keys()
    return keys


def lacks_vocabulary(folder: Path) -> bool:
    """Whether only weights that are not there know how many rows the embeddings have, so
    `read_args` would fail.
    """
    if (folder / CONFIG).exists() or not (folder / PARAMS).exists() or consolidated_files(folder):
        return False
    from transom.checkpoints.families.meta_params import needs_vocabulary

    return needs_vocabulary(read_params(folder))


def stated_vocabulary(folder: Path) -> int | None:
    """Rows of the embeddings as the config states them, also of models we cannot read; None where
    it is silent.
    """
    if not (folder / CONFIG).exists() and not (folder / PARAMS).exists():
        return None
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else read_params(folder)
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) and size > 0 else None


def _read_meta(folder: Path) -> ModelArgs:
    from transom.checkpoints.families.meta_params import args_from_meta, needs_vocabulary

    params, vocab_size = read_params(folder), -1
    if needs_vocabulary(params):  # only the weights know, and only then is torch needed
        from transom.checkpoints.files.consolidated import vocabulary_of

        dim = params.get("dim")
        if not isinstance(dim, int):
            raise RequestError(f"{folder / PARAMS}: dim: got {dim!r}; expected a whole params.json")
        vocab_size = vocabulary_of(folder, dim)
    return args_from_meta(params, str(folder / PARAMS), vocab_size)

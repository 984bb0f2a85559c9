"""The config of a run, as config.yaml describes it. No torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from transom.base.errors import RequestError, expect
from transom.base.fields import SEED, check_bounds, describe, read, type_at, write
from transom.base.yaml_files import read_yaml, word_value
from transom.config.layer_args import HeadArgs
from transom.config.model_args import ModelArgs
from transom.config.parallel_args import ParallelArgs
from transom.config.presets import preset
from transom.data.text.sources import SourceArgs
from transom.training.finetune.args import FinetuneArgs
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.schedule import ScheduleArgs

DEFAULT_ROWS = 8  # rows of a step of text


@dataclass(frozen=True)
class TokenizerArgs:
    """Which tokenizer: one that is trained on the text of the run, or one from a file."""

    kind: Literal["bpe", "chars", "bytes", "file"] = describe("bpe", "how text becomes tokens")
    vocab_size: int = describe(2048, "size of a trained bpe vocabulary", "tokens")
    path: str | None = describe(
        None, "tokenizer.json or a folder with one, for kind file", path=True
    )

    def __post_init__(self) -> None:
        fits = (self.path is not None) == (self.kind == "file")
        expect(fits, "path", self.path, "a path with kind = file, and only then")


@dataclass(frozen=True)
class DataArgs:
    """Where text comes from, and how it is divided into rows."""

    sources: str | tuple[SourceArgs | str, ...] = describe(
        (), "files, folders or globs of text, .jsonl or .parquet; one path, or a list of them"
    )
    held_out: float = describe(
        0.05,
        "share of held-out documents, by a hash of their names",
        at_least=0.0,
        below=1.0,
    )
    seq_len: int = describe(256, "length of a training row", "tokens", at_least=1)
    batch_size: int | None = describe(
        None,
        "rows per step over all ranks and micro-batches; null: by the number of rows for "
        f"fine-tuning and labelled lines, {DEFAULT_ROWS} for text",
        "rows",
        at_least=1,
    )
    cache_dir: str | None = describe(
        None, "folder of tokenized data; null: $TRANSOM_CACHE or ~/.cache/transom", path=True
    )

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def rows_per_step(self) -> int:
        """`batch_size`, or the default for text."""
        return DEFAULT_ROWS if self.batch_size is None else self.batch_size

    @property
    def source_list(self) -> list[SourceArgs]:
        """The sources as `SourceArgs`, at least one.

        Raises:
            RequestError: If there is none, or two of them have one name.
        """
        given = (self.sources,) if isinstance(self.sources, str) else self.sources
        expect(len(given) > 0, "data.sources", list(given), "at least one file, folder or glob")
        sources = [
            read(SourceArgs, {"path": one}, "data.sources") if isinstance(one, str) else one
            for one in given
        ]
        labels = [source.label for source in sources]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        expect(twice is None, "data.sources", twice, "one entry for each name or path")
        return sources


@dataclass(frozen=True)
class TrainArgs:
    """One run.

    Raises:
        RequestError: If a value is wrong, alone or together with others. The message names the
            field and what is expected.
    """

    out: str = describe("runs/train", "run folder to write", path=True)
    seed: int = describe(0, "seed of weights, data order and samples", **SEED)
    model: str | dict[str, Any] = describe(
        "demo", "name of a preset, or model fields; {preset: NAME, field: value} changes a preset"
    )
    base: str | None = describe(
        None, "folder, GGUF file or hub id of a model to start from, with its tokenizer", path=True
    )
    finetune: FinetuneArgs | None = describe(
        None, "fine-tuning of `base`; null: train it on more text"
    )
    tokenizer: TokenizerArgs = describe(TokenizerArgs, "how text becomes tokens")
    data: DataArgs = describe(DataArgs, "where text comes from")
    optimizer: OptimizerArgs = describe(OptimizerArgs, "how weights are updated")
    schedule: ScheduleArgs = describe(ScheduleArgs, "how the learning rate changes")
    steps: int = describe(1000, "optimizer steps", at_least=1)
    accumulate: int = describe(1, "micro-batches of a step; more take less memory", at_least=1)
    loss_chunk: int | None = describe(
        None,
        "tokens whose logits are computed at a time, 0: all; null: all of up to 4 million logits, "
        "else 16 million",
        "tokens",
        at_least=0,
    )
    activation_checkpoint: str = describe(
        "none",
        "what backward computes again: none, full (all blocks), every-K (each K-th block), "
        "selective (all but matrix products)",
    )
    activation_offload: bool = describe(
        False, "keep large activations in host memory until backward; GPUs only"
    )
    compile: bool = describe(False, "compile the blocks with torch.compile, if that works")
    dry_run: bool = describe(
        True, "run a micro-batch of full size before the first step, and print what it takes"
    )
    contrastive_temperature: float = describe(
        0.05, "embedding head: divisor of the products of vectors", above=0.0
    )
    ema_decay: float | None = describe(
        None, "decay of a moving average of the weights, which is saved", above=0.0, below=1.0
    )
    short_rows: float = describe(
        0.0,
        "first share of the steps, whose rows are cut into `short_rows_split` pieces "
        "(Shortformer, arXiv 2012.15832)",
        at_least=0.0,
        at_most=1.0,
    )
    short_rows_split: int = describe(2, "pieces of a row while rows are short", at_least=1)
    parallel: ParallelArgs = describe(ParallelArgs, "how ranks share the model and its rows")
    device: str = describe("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = describe(
        "auto", "dtype of matrix products; weights stay float32; float16 needs a GPU"
    )
    float8: bool = describe(
        False, "products of blocks in 8-bit floats; needs a GPU that has them, and dtype bfloat16"
    )
    threads: int | None = describe(None, "CPU threads; null: torch's default", at_least=1)
    eval_every: int = describe(
        0, "steps between held-out scores; 0: only at the end", "steps", at_least=0
    )
    eval_tokens: int | None = describe(
        100_000, "held-out tokens scored during training; all are scored at the end", "tokens"
    )
    save_every: int = describe(
        500, "steps between checkpoints; the last step is always saved", "steps", at_least=1
    )
    keep_last: int = describe(2, "checkpoints kept, besides the best", "checkpoints", at_least=1)
    patience: int | None = describe(
        None, "stop after this many scores that are not the best; null: never", "scores", at_least=1
    )
    sample_every: int = describe(0, "steps between samples; 0: none", "steps", at_least=0)
    sample_prompts: tuple[str, ...] = describe(("The",), "prompts of the samples")
    sample_tokens: int = describe(64, "length of a sample", "tokens", at_least=1)
    tensorboard: bool = describe(
        False, "also write TensorBoard curves into the run folder; needs the package"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        self.optimizer.check_in_backward(self.accumulate)
        size, length = self.data.batch_size, self.data.seq_len
        scores = self.finetune.scores if self.finetune is not None else 0
        known = re.fullmatch(r"none|full|selective|every-[1-9]\d*", self.activation_checkpoint)
        prompts = len(self.sample_prompts) > 0 and all(self.sample_prompts)
        self._expect(prompts, "sample_prompts", "a list of texts that are not empty")
        scored = self.patience is None or self.eval_every + scores > 0
        self._expect(scored, "patience", "null, or eval_every of 1 or more")
        kinds = "none, full, selective or every-K, such as every-2"
        self._expect(known is not None, "activation_checkpoint", kinds)
        # Products inside a compiled function cannot be told from the rest of it.
        apart = not self.compile or self.activation_checkpoint != "selective"
        kinds = "none, full or every-K with compile = True"
        self._expect(apart, "activation_checkpoint", kinds)
        fits = size is None or size % self.accumulate == 0
        self._expect(fits, "accumulate", f"a divisor of data.batch_size = {size}")
        fits = not self.short_rows or length % self.short_rows_split == 0
        self._expect(fits, "short_rows_split", f"a divisor of data.seq_len = {length}")
        if self.parallel.context_ring:
            packed = self.finetune is not None and self.finetune.packing is True
            expect(not packed, "finetune.packing", True, "false with parallel.context_ring")
            fits = self.dtype != "float32" or not self.device.startswith("cuda")
            self._expect(fits, "dtype", "bfloat16 or float16 with parallel.context_ring on a GPU")
        fits = self.finetune is None or self.base is not None
        expect(fits, "finetune", "given", "null without base")
        if self.base is None:
            self.check_model(self.model_args(vocab_size=None))
            return
        self._expect(self.model == "demo", "model", "no value with base, which is the model")
        plain = self.tokenizer == TokenizerArgs()
        expect(plain, "tokenizer", "given", "no value with base, which has its own")
        fits = self.finetune is None or not self.short_rows
        self._expect(fits, "short_rows", "0 with finetune: a row contains whole examples")

    def _expect(self, fits: bool, field: str, expected: str) -> None:
        """Raise a `RequestError` about a dotted field unless `fits`."""
        expect(fits, field, attrgetter(field)(self), expected)

    def check_model(self, args: ModelArgs) -> None:
        """Refuse settings that don't fit a model, the config's own or that of `base`."""
        longest = args.max_seq_len
        fits = self.data.seq_len <= longest
        self._expect(fits, "data.seq_len", f"at most model.max_seq_len = {longest}")
        if args.head is not None:
            self._check_head(args.head)
            return
        causal = all(layer.rule.kind != "full" for layer in args.layers)
        expected = "causal layers without model.head: others see the tokens to predict"
        expect(causal, "model.layer_pattern", args.pattern, expected)
        context = args.context_dim
        expect(context is None, "model.context_dim", context, "null: rows are text")

    def check_ranks(self, parallel: ParallelArgs, model: ModelArgs | None = None) -> None:
        """Refuse ranks that the batch, the model or the objective cannot be divided over.

        Args:
            parallel: The degrees, with a number for `shard`.
            model: The model of `base`, if it is known.
        """
        if self.finetune is not None:
            self.finetune.check_ranks(parallel)
        model = self.model_args(vocab_size=None) if self.base is None else model
        size = self.data.batch_size
        if model is not None:
            parallel.check_model(model)
            if self.finetune is None and model.head is None:
                size = self.data.rows_per_step
        shares = self.accumulate * parallel.rows
        expected = f"a multiple of accumulate x ranks = {shares}"
        expect(size is None or size % shares == 0, "data.batch_size", size, expected)

    def _check_head(self, head: HeadArgs) -> None:
        self._expect(not self.short_rows, "short_rows", "0 with model.head: a row is a text")
        writes = "0 with model.head, which generates no text"
        self._expect(not self.sample_every, "sample_every", writes)
        # Negatives are the other rows of a micro-batch: cutting a step changes the loss.
        divisible = head.kind == "classification" or self.accumulate == 1
        self._expect(divisible, "accumulate", "1 with an embedding head")

    def model_args(self, vocab_size: int | None) -> ModelArgs:
        """Return the model of the config.

        Args:
            vocab_size: Size of the tokenizer's vocabulary, which is that of the model unless the
                config gives a larger one. None leaves it to the config.
        """
        given: dict[str, Any] = (
            {"preset": self.model} if isinstance(self.model, str) else dict(self.model)
        )
        name = given.pop("preset", None)
        if vocab_size is not None:
            size = given.setdefault("vocab_size", vocab_size)
            fits = isinstance(size, int) and size >= vocab_size
            expected = f"at least the {vocab_size} tokens of the tokenizer"
            expect(fits, "model.vocab_size", size, expected)
        try:
            return preset(name, **given) if name is not None else ModelArgs.from_dict(given)
        except RequestError as error:
            raise RequestError(f"model.{error}") from None

    @property
    def finetune_settings(self) -> FinetuneArgs:
        """The value of `finetune` in the config of a fine-tuning run."""
        assert self.finetune is not None, "the caller has a fine-tuning run"
        return self.finetune

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain data, which `read_config` reads."""
        return write(self)


def read_config(
    path: str | Path | None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> TrainArgs:
    """Read the config of a run.

    Args:
        path: A YAML file. None stands for `base`.
        overrides: Words such as `data.seq_len=128`, whose values are read by the fields' types.
        base: Plain data of a config, by default an empty one.

    Raises:
        RequestError: If a key is unknown or a value is wrong.
    """
    data = copy.deepcopy(dict(base or {})) if path is None else read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            expected = "expected key=value, such as steps=100 or data.seq_len=128"
            raise RequestError(f"{override!r}: {expected}")
        keys = key.split(".")
        _set(data, keys, word_value(_declared(keys), text, key), key)
    return read(TrainArgs, data)


def _declared(keys: Sequence[str]) -> Any:
    """Return the type of a dotted field. Fields below `model` are those of a model, or `preset`."""
    if keys[0] == "model" and len(keys) > 1:
        return str if keys[1:] == ["preset"] else type_at(ModelArgs, keys[1:])
    return type_at(TrainArgs, keys)


def _set(data: dict[str, Any], keys: Sequence[str], value: Any, field: str) -> None:
    for key in keys[:-1]:
        # A field such as model.dim changes the preset that `model` names.
        if key == "model" and isinstance(data.get(key, "demo"), str):
            data[key] = {"preset": data.get(key, "demo")}
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RequestError(f"{field}: {key} is {inner!r}, which has no fields")
        data = inner
    data[keys[-1]] = value

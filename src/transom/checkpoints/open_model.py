"""Open a model with everything it is used with: tokenizer, chat template, stop tokens, settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, notice, short_repr
from transom.base.files import shown_name
from transom.base.runtime import warn_if_bfloat16_is_slow
from transom.chat.fingerprint import warn_if_other
from transom.chat.template import ChatTemplate
from transom.checkpoints.files.generation_config import (
    stated_settings,
    stop_strings,
    stop_tokens_of,
)
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.load import LoadPlan, Offloader, load
from transom.checkpoints.read_args import vocabulary_size
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class OpenedText:
    """The tokenizer of a model, its chat template and its stop tokens; no weights are read.

    Attributes:
        location: The folders that were found.
        tokenizer: The tokenizer of the adapter, or else of the model.
        chat_template: The template that was asked for: the name of a built-in one, the name of one
            in the folder, or a file. None takes the folder's own.
    """

    location: ModelLocation
    tokenizer: Tokenizer
    chat_template: str | None = None

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template asked for, that of the adapter or the model, or the built-in one.

        A built-in template is taken, with a notice, if the vocabulary has its control tokens. None
        if there is no template.
        """
        return ChatTemplate.find(self.location.folders, self.tokenizer, self.chat_template)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of generation that the folders state (`generation_config.json`)."""
        return stated_settings(self.location.folders)

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text."""
        return stop_tokens_of(self.location, self.tokenizer)

    @property
    def turn_stop_tokens(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text or a turn of the chat template."""
        return stop_tokens_of(self.location, self.tokenizer, self.template)

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts that end an answer (`stop_strings` of the settings)."""
        return stop_strings(self.location)


@dataclass(frozen=True, kw_only=True)
class OpenedModel(OpenedText):
    """A model in evaluation mode, its tokenizer, and what the files beside them state.

    Attributes:
        name: The name that the model was opened by.
        model: The model, with the adapter of the location active.
    """

    name: str
    model: LLM

    @cached_property
    def template(self) -> ChatTemplate | None:
        """As for `OpenedText`; a notice is printed if the model was trained with another."""
        template = ChatTemplate.find(self.location.folders, self.tokenizer, self.chat_template)
        warn_if_other(self.location.folders, self.tokenizer, template)
        return template


def open_model(
    name: str | Path | ModelLocation,
    *,
    device: str = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    chat_template: str | None = None,
    keep_quantized: bool | None = None,
    before_weights: Callable[[OpenedText, LoadPlan], int | None] | None = None,
    offload: Offloader | None = None,
) -> OpenedModel:
    """Open a model with its tokenizer, chat template, stop tokens and generation settings.

    Template, stop tokens and settings are read when they are first used, so a model without them
    opens too. Notices tell which step of a run is used, whether the tokenizer differs from the one
    in training, and whether bfloat16 is slow on the device.

    Args:
        name: A model or adapter folder, a run folder for its best step, a hub id, or the result of
            `find_model`.
        device: As for `load`; `auto` takes the best device there is.
        dtype: As for `load`; None keeps the dtype of the files.
        revision: Branch, tag or commit of a hub id.
        chat_template: The name of a built-in template or of one in the folder, or a file; None
            takes the folder's own.
        keep_quantized: As for `load`.
        before_weights: As for `load`, called with the tokenizer too.
        offload: As for `load`.

    Raises:
        RequestError: As for `load`; or there is no tokenizer, or it does not fit the embeddings.
    """
    location = name if isinstance(name, ModelLocation) else find_model(name, revision)
    tokenizer = _open_tokenizer(location)
    text = OpenedText(location=location, tokenizer=tokenizer, chat_template=chat_template)
    check = None if before_weights is None else functools.partial(before_weights, text)
    model = load(
        location,
        device,
        dtype,
        keep_quantized=keep_quantized,
        before_weights=check,
        offload=offload,
    )
    warn_if_bfloat16_is_slow(model.dtype, model.device)
    warn_if_other(location.folders, tokenizer, None)
    return OpenedModel(
        name=str(name),
        location=location,
        tokenizer=tokenizer,
        model=model,
        chat_template=chat_template,
    )


def open_text(
    name: str | Path | ModelLocation,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
) -> OpenedText:
    """Open the tokenizer, chat template and stop tokens of a model without its weights.

    The arguments are those of `open_model`. A folder with a tokenizer and no model, and the file of
    a tokenizer, are accepted too.

    Raises:
        RequestError: There is no tokenizer, or it makes tokens that have no embedding.
    """
    location = name
    if not isinstance(location, ModelLocation):
        location = find_model(location, revision, settings_only=True)
    tokenizer = _open_tokenizer(location)
    return OpenedText(location=location, tokenizer=tokenizer, chat_template=chat_template)


def load_tokenizer(folder: str | Path, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model or adapter folder, of a run's best step, or of a hub id.

    No weights are downloaded. A folder with a tokenizer and no model, and the file of a tokenizer,
    are accepted too.

    Raises:
        RequestError: There is no tokenizer, or it makes tokens that have no embedding.
    """
    return open_text(folder, revision=revision).tokenizer


def _open_tokenizer(location: ModelLocation) -> Tokenizer:
    tokenizer, where = Tokenizer.load(location.tokenizer), shown_name(location.tokenizer)
    rows = vocabulary_size(location)
    beyond = set() if rows is None else set(range(rows, tokenizer.vocab_size))
    plain = sorted(beyond - tokenizer.special_ids)
    if plain:
        token = tokenizer.id_to_token(plain[0])
        raise RequestError(
            f"{where}: token {short_repr(token)} has id {plain[0]}; expected ids below {rows}, the "
            "number of rows of the model's embeddings"
        )
    if beyond:  # special tokens, which no text contains
        first = min(beyond)
        notice(f"{where}: special tokens from id {first} on have no embedding and must not be used")
    return tokenizer

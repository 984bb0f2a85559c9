"""Generation in text: prompts in, pieces of text out that never split a character, and stop strings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from transom.cache.model_cache import ModelCache
from transom.errors import require
from transom.generation.loop import GREEDY, stream
from transom.generation.sampling import SamplingArgs
from transom.model import LLM
from transom.paths import read_json
from transom.tokenizer import Tokenizer


@dataclass
class Completion:
    """What one row has said: its text, its tokens, and why it ended (None while it runs).

    The tokens include a stop token and those of `stop_string`, the one that ended the row; the text does not.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stop_string: str = ""


class TextStream:
    """Iterate for the new text of each step, one piece per row, often ""; `completions` hold it all."""

    def __init__(self, rows: Sequence[_Row], steps: Iterator[list[int | None]]) -> None:
        self.completions = [row.completion for row in rows]
        self._rows, self._steps = rows, steps

    def __iter__(self) -> Iterator[list[str]]:
        for ids in self._steps:
            yield ["" if id is None else row.push(id) for row, id in zip(self._rows, ids, strict=True)]
            if all(row.completion.finish_reason for row in self._rows):
                return


def stream_text(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingArgs = GREEDY,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    prefill_step_size: int = 512,
    cache: ModelCache | None = None,
    log_probs: list[Tensor] | None = None,
) -> TextStream:
    """Continue prompts given as text or as token ids; a row ends before the first of `stop` that it writes.

    All else as in `loop.stream`.
    """
    for word in stop:
        require(len(word) > 0, "stop", word, "accepted is text of one character or more")
    steps = stream(
        model,
        encode_prompts(tokenizer, prompts),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seeds,
        stop_tokens=stop_tokens,
        prefill_step_size=prefill_step_size,
        cache=cache,
        log_probs=log_probs,
    )
    rows = [_Row(tokenizer, stop, frozenset(stop_tokens), max_new_tokens) for _ in prompts]
    return TextStream(rows, steps)


def complete(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingArgs = GREEDY,
    ends: Sequence[int] = (),
) -> list[Completion]:
    """The whole continuation of each prompt, ended by the tokenizer's EOS, by one of `ends`, or by the length."""
    stop_tokens = (*ends, *(() if tokenizer.eos_id is None else (tokenizer.eos_id,)))
    texts = stream_text(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens
    )
    for _ in texts:
        pass
    return texts.completions


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Token ids of each prompt: text with a BOS in front where the tokenizer's makers put one, ids as they are."""
    add_bos = tokenizer.adds_bos
    return [tokenizer.encode(prompt, add_bos=add_bos) if isinstance(prompt, str) else prompt for prompt in prompts]


def stop_tokens_of(folder: str | Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The stop tokens that a model folder's generation_config.json names, else the tokenizer's own."""
    path = Path(folder) / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    if named is None:
        return tuple(tokenizer.stop_ids)
    ids = named if isinstance(named, list) else [named]
    accepted = "accepted is a token id or a list of them"
    require(all(type(id) is int for id in ids), f"{path}: eos_token_id", named, accepted)
    return tuple(ids)


class StopStrings:
    """Lets text through up to the first stop string, wherever tokens are cut.

    Text that may be the beginning of one is held back. Of several, the one that is complete first counts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = ""  # the one that has come
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> str:
        """What may be shown now that `text` has come."""
        text = self._held + text
        places = [(at + len(word), at) for word in self._stop if (at := text.find(word)) >= 0]
        if places:
            end, start = min(places)
            self.found, self._held = text[start:end], ""
            return text[:start]
        shown = len(text) - max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What is still held, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """The longest end of `text`, in characters, that `word` begins with."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(word[:size])), 0)


class _Row:
    """One row's way from ids to text."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], stop_tokens: Collection[int], max_new_tokens: int
    ) -> None:
        self.completion = Completion()
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._stop = StopStrings(stop)
        self._stop_tokens = stop_tokens
        self._max_new_tokens = max_new_tokens

    def push(self, id: int) -> str:
        """The text that `id` completes; nothing once a stop string has ended the row."""
        done = self.completion
        if done.finish_reason:
            return ""
        done.tokens.append(id)
        stopped = id in self._stop_tokens
        last = stopped or len(done.tokens) == self._max_new_tokens
        text = self._decode(id, stopped)
        if last:
            text += self._decoder.finish()
        text = self._stop.push(text)
        if last:
            text += self._stop.finish()
        if last or self._stop.found:
            done.finish_reason = "stop" if stopped or self._stop.found else "length"
            done.stop_string = self._stop.found
        done.text += text
        return text

    def _decode(self, id: int, stopped: bool) -> str:
        if stopped:
            return ""
        if self._tokenizer.id_to_token(id) is None:  # models round their vocabulary up; nothing is written there
            return self._decoder.finish() + "\ufffd"
        return self._decoder.push(id)

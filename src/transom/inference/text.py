"""Generation in text: prompts in, pieces of text out that never split a character, and stop
strings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from transom.base.errors import require
from transom.cache.model_cache import ModelCache
from transom.inference.loop import GREEDY, stream
from transom.inference.sampling import SamplingArgs
from transom.inference.stopping import ControlSigns, StopStrings
from transom.models.llm import LLM
from transom.tokenizers.stream import StreamDecoder
from transom.tokenizers.tokenizer import Tokenizer


@dataclass
class Completion:
    """What one row has said: its text, its tokens, and why it ended (None while it runs).

    The tokens include a stop token and those of `stop_string`, the one that ended the row; the text
    does not.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stop_string: str = ""


class TextStream:
    """Iterate for the new text of each step, one piece per row, often ""; `completions` hold it
    all.
    """

    def __init__(self, rows: Sequence[_Row], steps: Iterator[list[int | None]]) -> None:
        self.completions = [row.completion for row in rows]
        self._rows, self._steps = rows, steps

    def __iter__(self) -> Iterator[list[str]]:
        for ids in self._steps:
            yield [
                "" if id is None else row.push(id) for row, id in zip(self._rows, ids, strict=True)
            ]
            if all(row.completion.finish_reason for row in self._rows):
                return

    def run(self) -> list[Completion]:
        """Run all rows to their ends; return the completions with kept control tokens in their
        texts.
        """
        shown = [""] * len(self._rows)
        for pieces in self:
            shown = [text + piece for text, piece in zip(shown, pieces, strict=True)]
        return [replace(one, text=text) for one, text in zip(self.completions, shown, strict=True)]


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
    kept: Literal["all"] | Collection[int] = (),
) -> TextStream:
    """Continue prompts given as text or as token ids; a row ends before the first string of `stop`
    in it.

    A stop string may be a control token or contain some. `kept` are ids of control tokens that the
    pieces spell out, stop tokens included; `completions` never contain any. All else is as in
    `loop.stream`.
    """
    for word in stop:
        require(len(word) > 0, "stop", word, "expected text of one character or more")
    special = tokenizer.special_tokens
    words = {
        special[word]: word for word in stop if word in special and special[word] not in stop_tokens
    }
    stop_tokens = (*stop_tokens, *words)
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
    stops = frozenset(stop_tokens)
    rows = [_Row(tokenizer, stop, stops, words, max_new_tokens, kept) for _ in prompts]
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
    """Return the continuation of each prompt up to a stop token of the tokenizer or of `ends`, or
    the length.
    """
    stop_tokens = (*ends, *tokenizer.stop_ids)
    texts = stream_text(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
    )
    return texts.run()


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str | list[int]], *, special: bool = False
) -> list[list[int]]:
    """Return the ids of each prompt: for text with the tokens that its tokenizer puts first, ids
    unchanged.

    With `special`, spellings of control tokens in a text become control tokens; otherwise they stay
    text.
    """
    allowed: Literal["all"] | tuple[()] = "all" if special else ()
    return [
        tokenizer.encode_prompt(prompt, allowed_special=allowed)
        if isinstance(prompt, str)
        else prompt
        for prompt in prompts
    ]


class _Row:
    """One row's way from ids to text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        stop_tokens: Collection[int],
        stop_words: Mapping[int, str],
        max_new_tokens: int,
        kept: Literal["all"] | Collection[int],
    ) -> None:
        self.completion = Completion()
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._signs = ControlSigns(tokenizer, kept)
        self._stop = StopStrings(stop, self._signs)
        self._stop_tokens, self._stop_words = stop_tokens, stop_words
        self._max_new_tokens = max_new_tokens

    def push(self, id: int) -> str:
        """Return the text that `id` completes; nothing once a stop string has ended the row."""
        done = self.completion
        if done.finish_reason:
            return ""
        done.tokens.append(id)
        stopped = id in self._stop_tokens
        last = stopped or len(done.tokens) == self._max_new_tokens
        text = "" if stopped else self._decode(id)
        if last:
            text += self._decoder.finish()
        text = self._stop.push(text)
        if last:
            text += self._stop.finish()
        if last or self._stop.found:
            done.finish_reason = "stop" if stopped or self._stop.found else "length"
            done.stop_string = self._stop.found or self._stop_words.get(id, "")
        done.text += self._signs.dropped(text)
        if stopped and id in self._signs:
            text += self._signs.of(id)
        return self._signs.spelled(text)

    def _decode(self, id: int) -> str:
        if id in self._signs:
            return self._decoder.flush() + self._signs.of(id)
        if (
            self._tokenizer.id_to_token(id) is None
        ):  # models round their vocabulary up; nothing is written there
            return self._decoder.finish() + "\ufffd"
        return self._decoder.push(id)

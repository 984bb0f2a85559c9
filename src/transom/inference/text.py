"""Generation of text: prompts in, and pieces of text out that never split a character."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transom.base.errors import expect
from transom.base.runtime import memory_bytes
from transom.inference.decode_args import DEFAULT
from transom.inference.forward import Tokens
from transom.inference.loop import GREEDY, stream
from transom.inference.sampling import SamplingArgs
from transom.inference.speculate import DraftCounts
from transom.inference.stopping import ControlSigns, StopStrings
from transom.models.llm import LLM
from transom.tokenizers.stream import StreamDecoder
from transom.tokenizers.tokenizer import Tokenizer


@dataclass
class Completion:
    """The text of one row.

    Attributes:
        text: The text so far, without a stop token, a stop string and control tokens.
        tokens: Its token ids, those of a stop token and a stop string included.
        finish_reason: Why the row ended; None while it runs.
        stop_string: The stop string that ended it, or "".
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stop_string: str = ""


class TextStream:
    """Iterate for the new text of each step: one piece per row, which is often "".

    Attributes:
        completions: The texts of all rows so far.
        prompt_tokens: Tokens of all prompts.
        prompt_seconds: Time until the first token of each row, in seconds.
        generation_seconds: Time of the steps after it, in seconds.
        counts: The proposed and accepted tokens of speculative decoding, None without it.
    """

    def __init__(
        self,
        rows: Sequence[_Row],
        steps: Tokens,
        prompt_tokens: int,
        counts: DraftCounts | None = None,
    ) -> None:
        self.completions = [row.completion for row in rows]
        self.prompt_tokens, self.counts = prompt_tokens, counts
        self.prompt_seconds = self.generation_seconds = 0.0
        self._rows, self._steps = rows, steps

    def __iter__(self) -> Iterator[list[str]]:
        start = time.perf_counter()
        try:
            for ids in self._steps:
                if not self.prompt_seconds:
                    self.prompt_seconds = time.perf_counter() - start
                pairs = zip(self._rows, ids, strict=True)
                yield ["" if id is None else row.push(id) for row, id in pairs]
                if all(row.completion.finish_reason for row in self._rows):
                    break
        finally:
            self.close()
        self.generation_seconds = time.perf_counter() - start - self.prompt_seconds

    def close(self) -> None:
        """End the generation, and take what is not part of a text back from the cache."""
        self._steps.close()

    def run(self) -> list[Completion]:
        """Run all rows to their ends and return the completions.

        Control tokens that are kept are in their texts.
        """
        shown = [""] * len(self._rows)
        for pieces in self:
            shown = [text + piece for text, piece in zip(shown, pieces, strict=True)]
        return [replace(one, text=text) for one, text in zip(self.completions, shown, strict=True)]

    def rates(self, model: LLM) -> dict[str, Any]:
        """Return counts of tokens, tokens per second, and the peak of memory in bytes.

        The first token of a row is computed with its prompt, so it does not count for the speed of
        generation.
        """
        sizes = [len(row.tokens) for row in self.completions]
        after_first = sum(sizes) - len(sizes)
        return {
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": sum(sizes),
            "prompt_tokens_per_second": self.prompt_tokens / max(self.prompt_seconds, 1e-9),
            "generation_tokens_per_second": after_first / max(self.generation_seconds, 1e-9),
            "peak_memory_bytes": memory_bytes(model.device),
            **({} if self.counts is None else vars(self.counts)),
        }


def stream_text(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    kept: Literal["all"] | Collection[int] = (),
    **options: Any,
) -> TextStream:
    """Continue a batch of prompts, given as text or as token ids.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        prompts: Texts or token ids, one per row.
        max_new_tokens: New tokens per row at most.
        stop: Strings that end a row. The text ends before the first of them. A stop string may
            contain or be a control token.
        stop_tokens: Ids that end a row.
        kept: Ids of control tokens that the pieces spell out, stop tokens included. The
            `completions` never contain control tokens.
        **options: `sampling`, `seeds`, `decode`, `cache`, `draft` and `log_probs` of `stream`.

    Raises:
        RequestError: The request can't be computed. It is raised before the model runs.
    """
    for word in stop:
        expect(len(word) > 0, "stop", word, "text of one character or more")
    special = tokenizer.special_tokens
    words = {special[w]: w for w in stop if w in special and special[w] not in stop_tokens}
    stop_tokens = (*stop_tokens, *words)
    ids = encode_prompts(tokenizer, prompts)
    options |= {"max_new_tokens": max_new_tokens, "stop_tokens": stop_tokens}
    speculates = options.get("decode", DEFAULT).proposals(options.get("draft"))
    counts = DraftCounts() if speculates else None
    steps = stream(model, ids, counts=counts, **options)
    stops = frozenset(stop_tokens)
    rows = [_Row(tokenizer, stop, stops, words, max_new_tokens, kept) for _ in prompts]
    return TextStream(rows, steps, sum(map(len, ids)), counts)


def complete(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingArgs = GREEDY,
    ends: Sequence[int] = (),
) -> list[Completion]:
    """Return the completion of each prompt.

    It ends at a stop token of the tokenizer, at an id of `ends`, or after `max_new_tokens`.
    """
    stop_tokens = (*ends, *tokenizer.stop_ids)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    return stream_text(model, tokenizer, prompts, stop_tokens=stop_tokens, **options).run()


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str | list[int]], *, special: bool = False
) -> list[list[int]]:
    """Return the token ids of each prompt.

    A text gets the tokens that its tokenizer puts first; ids stay as they are. With `special`,
    spellings of control tokens in a text become control tokens. Otherwise they are plain text.
    """
    allowed: Literal["all"] | tuple[()] = "all" if special else ()
    return [
        tokenizer.encode_prompt(one, allowed_special=allowed) if isinstance(one, str) else one
        for one in prompts
    ]


class _Row:
    """The decoder of one row: token ids in, text out."""

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
        """Return the text that `id` completes; "" after a stop string has ended the row."""
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
        # Models round their vocabulary up; such ids have no text.
        if self._tokenizer.id_to_token(id) is None:
            return self._decoder.finish() + "\ufffd"
        return self._decoder.push(id)

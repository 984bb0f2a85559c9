"""A conversation with a model: turns in, reasoning and answers out, with one KV cache.

Nothing here reads or prints turns, so a command line and a server can both use it::

    session = open_session(open_model("runs/demo"))
    answer = session.ask("Hello")
    for kind, text in answer:  # kind is "reasoning" or "answer"
        print(text, end="")
    session.keep(answer)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, expect, explained, notice
from transom.base.runtime import mixed_seed
from transom.chat.fingerprint import warn_if_other
from transom.chat.marking import common_prefix
from transom.chat.reasoning import Markers, Piece, Splitter, find_markers, marker_ids
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.fingerprint import check_base, read_facts
from transom.checkpoints.merge import named_folders
from transom.checkpoints.open_model import OpenedModel
from transom.inference.decode_args import DEFAULT, DecodeArgs
from transom.inference.framing import Framing, GrowingText, Messages
from transom.inference.loop import (
    GREEDY,
    check_language_model,
    truncate_after_interrupt,
)
from transom.inference.prompt_cache import PromptCache, conversation_prefixes
from transom.inference.room import MAX_TOKENS, check_memory, session_room
from transom.inference.sampling import SamplingArgs
from transom.inference.speculate import Proposer
from transom.inference.text import Completion, TextStream, stream_text
from transom.lora.adapters import activate_adapters, active_adapters, adapter_names
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer

NONE = "none"  # the name that stands for no adapter


class Answer:
    """The answer to one turn, which is generated while it is iterated.

    Iteration yields (kind, text) pieces, where kind is `reasoning` or `answer`. Afterwards `text`
    and `reasoning` are complete.

    Args:
        turn: The text of the turn.
        ids: The token ids that the model continues.
        texts: The generation, not started yet.
        splitter: Separates reasoning from the answer; None if the model has no reasoning.
        hidden: None, or the control tokens that belong to neither text, if pieces are yielded as
            the model generates them.
        prefill: The text that the model continues, which begins the answer.
    """

    def __init__(
        self,
        turn: str,
        ids: list[int],
        texts: TextStream,
        splitter: Splitter | None,
        hidden: Sequence[str] | None,
        prefill: str,
    ) -> None:
        self.turn, self.ids, self.prefill = turn, ids, prefill
        self.completion: Completion = texts.completions[0]
        self._texts, self._splitter = texts, splitter
        self._hidden = None
        if hidden is not None:
            self._hidden = re.compile("|".join(map(re.escape, hidden)) or "(?!)")

    def __iter__(self) -> Iterator[Piece]:
        yield from self._pieces(self.prefill)
        for (text,) in self._texts:
            yield from self._pieces(text)
        if self._splitter is not None:
            rest = self._splitter.finish()
            yield from rest if self._hidden is None else ()

    def close(self) -> None:
        """End the generation."""
        self._texts.close()

    def _pieces(self, text: str) -> list[Piece]:
        pieces: list[Piece] = [("answer", text)] if text else []
        if self._splitter is None:
            return pieces
        if self._hidden is None:
            return self._splitter.push(text)
        self._splitter.push(self._hidden.sub("", text))
        return pieces

    @property
    def text(self) -> str:
        """The answer so far, without reasoning."""
        if self._splitter is None:
            return self.prefill + self.completion.text
        return self._splitter.answer

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "" if self._splitter is None else self._splitter.reasoning


@dataclass(frozen=True)
class AnswerArgs:
    """How answers are generated.

    Attributes:
        sampling: How tokens are chosen; every turn has random numbers of its own.
        max_tokens: New tokens per answer at most.
        stop_tokens: Ids that end an answer.
        stop: Strings that end an answer.
        decode: How the model runs.
        draft: Proposes tokens. Its cache follows the conversation.
        show_special: Yield answers as the model generates them, with control tokens.
    """

    sampling: SamplingArgs = GREEDY
    max_tokens: int = MAX_TOKENS
    stop_tokens: Sequence[int] = ()
    stop: Sequence[str] = ()
    decode: DecodeArgs = DEFAULT
    draft: Proposer | None = None
    show_special: bool = False


class Session:
    """A conversation, and a KV cache of its beginning, so that only new tokens are run.

    `open_session` builds one from a model folder.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        framing: How turns become tokens.
        args: How answers are generated.
        room: Tokens of the conversation at most.
        markers: The markers of the model's reasoning, if any.
    """

    def __init__(
        self,
        model: LLM,
        tokenizer: Tokenizer,
        framing: Framing,
        args: AnswerArgs,
        room: int,
        markers: Markers | None = None,
    ) -> None:
        self.model, self.tokenizer, self.framing, self.args = model, tokenizer, framing, args
        self.room, self.markers = room, markers
        check_memory(model.args, 1, room, model.dtype, model.device, args.decode)
        self.cache = model.make_cache(1, room, kv_bits=args.decode.kv_bits)
        self.cached: list[int] = []  # the ids of the tokens in the cache
        self.prefixes = conversation_prefixes(model, args.decode)
        self.turns = 0
        self.system = ""
        self.saved_files: set[Path] = set()

    def ask(self, turn: str) -> Answer:
        """Return the answer to `turn`. Iterate it, then call `keep`.

        Raises:
            RequestError: The turn can't be answered. The conversation is unchanged.
        """
        ids = self.framing.prompt(turn)
        left = self.room - len(ids)
        if left < 1:
            raise RequestError(f"turn: got a conversation of {len(ids)} tokens; {self._full}")
        self._roll_back_to(ids)
        markers, tokenizer, args = self.markers, self.tokenizer, self.args
        shown = marker_ids(tokenizer) if markers is None else markers.control_ids(tokenizer)
        texts = stream_text(
            self.model,
            tokenizer,
            [ids],
            max_new_tokens=min(args.max_tokens, left),
            sampling=args.sampling,
            seeds=[mixed_seed(args.sampling.seed, self.turns)],
            stop=args.stop,
            stop_tokens=args.stop_tokens,
            decode=args.decode,
            draft=args.draft,
            cache=self.cache,
            kept="all" if args.show_special else shown,
        )
        hidden = [word for word, id in tokenizer.special_tokens.items() if id not in shown]
        prefill = self.framing.prefill
        splitter = None if markers is None else markers.splitter(begun=bool(prefill))
        return Answer(turn, ids, texts, splitter, hidden if args.show_special else None, prefill)

    def keep(self, answer: Answer, *, interrupted: bool = False) -> None:
        """Add a turn and its answer to the conversation, as far as it was generated.

        Args:
            answer: What `ask` returned.
            interrupted: Whether its iteration was interrupted by an exception.
        """
        answer.close()
        done, prompt = answer.completion, answer.ids
        self.turns += 1
        message = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        ids = [*prompt, *(id for id in done.tokens if id not in self.args.stop_tokens)]
        self.framing.add(answer.turn, message, done, ids)
        if interrupted:
            args = self.args
            step = 1 + args.decode.proposals(args.draft)
            in_flight = step if done.tokens else args.decode.prefill_step_size
            truncate_after_interrupt(self.cache, len(prompt) + len(done.tokens), in_flight)
        elif done.finish_reason == "length" and self.room - len(prompt) <= self.args.max_tokens:
            notice(self._full, again=True)
        self.cached = (prompt + done.tokens)[: int(self.cache.lengths_B[0])]

    def reset(self, system: str | None = None) -> None:
        """Start a new conversation.

        The cache keeps the tokens that the next prompt shares with the last one.

        Args:
            system: The system message of the new conversation; None keeps the last one.
        """
        self.system = self.system if system is None else system
        self.framing.reset(self.system)

    def use_adapter(self, name: str) -> None:
        """Use the adapter of this name alone from now on, or no adapter for `none`.

        The conversation stays. The cache is emptied, since its keys are those of other weights.

        Raises:
            RequestError: The model has no adapter of this name.
        """
        names = adapter_names(self.model)
        known = bool(names) and name in (*names, NONE)
        expected = ", ".join((*names, NONE)) if names else "a chat that was opened with adapters"
        expect(known, "adapter", name, expected)
        activate_adapters(self.model, () if name == NONE else (name,))
        notice(f"adapter in use: {name}", again=True)
        self.cache.reset()
        self.cached = []

    def save(self, name: str) -> None:
        """Write the conversation into a new file, or again into a file that `save` wrote before.

        Raises:
            RequestError: The file exists already, or it can't be written.
        """
        expect(bool(name), "file", name, "the name of a file")
        path, content = Path(name).expanduser(), self.framing.saved()
        fits = path in self.saved_files or not path.exists()
        expect(fits, "file", name, "a new name, since the file exists")
        with explained(f"file: got {name!r}; expected a file that can be written", OSError):
            path.write_text(content, encoding="utf-8")
        self.saved_files.add(path)
        notice(f"{name}: {len(content)} characters written", again=True)

    def finish(self) -> None:
        """Write the conversation so far into the `prompt_cache_file`, if there is one.

        Raises:
            WorkError: It could not be written.
        """
        if isinstance(self.prefixes, PromptCache) and self.cached:
            self.prefixes.add(self.cache, 0, self.cached)
            self.prefixes.save()

    @property
    def _full(self) -> str:
        return f"the context of {self.room} tokens is full, and a reset empties it"

    def _roll_back_to(self, ids: list[int]) -> None:
        """Roll the cache back to the tokens that it shares with the beginning of `ids[:-1]`.

        A template may render an answer differently than the model generated it.
        """
        same = common_prefix(self.cached, ids[:-1])
        beyond = len(self.cached) - same
        if beyond and not self.cache.rollback(beyond, beyond):
            same = 0  # a ring has overwritten keys that it needs
        if not same:
            self.cache.reset()
        if self.prefixes is not None:
            self.prefixes.variant = active_adapters(self.model)
            if same:
                self.prefixes.watch(self.cache, [ids], [same])
            else:
                (same,) = self.prefixes.restore(self.cache, [ids])
        self.cached = ids[:same]


def open_session(
    opened: OpenedModel,
    answers: AnswerArgs = AnswerArgs(),
    *,
    system: str = "",
    prefill: str = "",
    use_template: bool = True,
    template_values: Mapping[str, Any] | None = None,
    adapters: Mapping[str, str] | None = None,
    ignore_eos: bool = False,
) -> Session:
    """Start a conversation with a model, turn by turn through its chat template.

    A notice tells which template is used. Without one, turns continue one growing text.

    Args:
        opened: What `open_model` returned.
        answers: How answers are generated. Stop tokens and stop strings of the folder are added.
        system: The text in front of the conversation.
        prefill: The text that every answer begins with. It needs a chat template.
        use_template: False for one growing text, even if there is a chat template.
        template_values: Variables of the chat template, such as `enable_thinking`.
        adapters: More adapters by name, as folders or runs. `Session.use_adapter` chooses one.
        ignore_eos: Add no stop tokens and stop strings of the folder.

    Raises:
        RequestError: The model can't chat, or an argument does not fit it.
    """
    model, tokenizer = opened.model, opened.tokenizer
    check_language_model(model.args)
    folders = load_adapters(model, opened.location.model, adapters or {})
    template = opened.template if use_template else None
    framing: Framing
    if template is None:
        expect(not prefill, "prefill", prefill, "a chat template with it")
        framing, markers, stop_tokens = GrowingText(tokenizer), None, opened.stop_tokens
        why = "this model has no chat template" if use_template else "the chat template is ignored"
        notice(f"{why}: each turn continues one growing text, on a new line")
    else:
        values = dict(template_values or {})
        # Refuse values now instead of in every turn.
        template.conversation([{"role": "user", "content": ""}], variables=values)
        framing, markers = Messages(template, values, prefill), find_markers(template, **values)
        stop_tokens = opened.turn_stop_tokens
        notice(f"turns are rendered by {template.origin}")
    for folder in folders:
        warn_if_other((folder,), tokenizer, template)
    if not ignore_eos:
        ids, words = (*answers.stop_tokens, *stop_tokens), (*answers.stop, *opened.stop_strings)
        answers = replace(answers, stop_tokens=ids, stop=words)
    room = session_room(model.args, answers.decode)
    session = Session(model, tokenizer, framing, answers, room, markers)
    session.reset(system)
    return session


def load_adapters(model: LLM, base: Path, adapters: Mapping[str, str]) -> list[Path]:
    """Add adapters to a model and return their folders; the active adapters stay active.

    Args:
        model: The model.
        base: The folder of its weights.
        adapters: Adapter folders, or runs of adapters, by name.

    Raises:
        RequestError: An adapter was trained with other weights, or does not fit the model.
    """
    active = active_adapters(model)
    _, folders = named_folders(base, list(adapters.values())) if adapters else (base, [])
    for name, folder in zip(adapters, folders, strict=True):
        facts = read_facts(folder)
        if facts is not None and Path(facts.base).resolve() != base.resolve():
            check_base(folder, base)
        load_adapter(model, folder, name)
    if adapters:
        activate_adapters(model, active)
        in_use = ", ".join(active) or NONE
        notice(f"adapters: {', '.join(adapter_names(model))}; in use: {in_use}")
    return [Path(folder) for folder in folders]

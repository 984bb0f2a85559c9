"""Transom's models in lm-evaluation-harness (`lm_eval`), under the name `transom`.

    lm_eval --model transom --model_args pretrained=FOLDER --tasks hellaswag         # lm_eval after
    0.4.13 python -m transom.evaluation.harness --model transom --model_args pretrained=FOLDER
    --tasks hellaswag

Newer versions find the class by the entry point `lm_eval.models`; the second line is for those that
do not: it is their own command line with this model registered. Only here is `lm_eval` imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from tqdm import tqdm

from transom.base.errors import RequestError, nearest, notice, require
from transom.base.runtime import machine
from transom.base.version import __version__
from transom.chat.files import DEFAULT
from transom.chat.reasoning import Markers, find_markers, split
from transom.chat.template import ChatTemplate
from transom.evaluation.answers import complete_prompts
from transom.evaluation.bits import scored
from transom.evaluation.choices import continuation_window
from transom.evaluation.eval_model import EvalModel
from transom.inference.sampling import SamplingArgs

NAME = "transom"
NEW_TOKENS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # the first given counts
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


class TransomLM(TemplateLM):
    """A model folder, run folder, adapter folder or hub id, which answers as the library's own `hf`
    model does.

    Texts are encoded with special tokens found by their spelling, since chat templates arrive as
    text.
    """

    def __init__(
        self,
        pretrained: str | EvalModel,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        chat_template: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        batch_tokens: int = 4096,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
    ) -> None:
        """`batch_size` rows at most, `auto` as many as `batch_tokens` hold; lengths in tokens."""
        super().__init__()
        if isinstance(pretrained, EvalModel):
            self.subject = pretrained
        else:
            self.subject = EvalModel.open(
                pretrained,
                revision=revision,
                device=device or "auto",
                dtype=dtype,
                chat_template=chat_template,
            )
        auto = str(batch_size).startswith("auto")
        rows = max_batch_size if auto else int(batch_size)
        require(rows is None or rows >= 1, "batch_size", batch_size, "expected auto, or 1 or more")
        longest = self.subject.model.args.max_seq_len
        fits = max_length is None or 1 <= max_length <= longest
        require(fits, "max_length", max_length, f"expected 1 to {longest}, the model's max_seq_len")
        self.tokenizer = self.subject.tokenizer
        self.max_length = longest if max_length is None else max_length
        self.max_gen_toks = max_gen_toks
        self.batch_rows, self.batch_tokens = rows, batch_tokens
        self.begins = bool(self.tokenizer.begin) if add_bos_token is None else add_bos_token
        self._chats = self._begun = (
            False  # whether prompts are chats, and whether their answers have begun
        )
        self._device = self.subject.model.device

    # -- text and ids
    # ------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos_id = self.tokenizer.eos_id
        if eos_id is None:
            raise RequestError(
                f"{self.subject.location}: the tokenizer has no EOS token; expected one with it"
            )
        return eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without context."""
        prefix = self.subject.prefix
        return self.eot_token_id if prefix is None else prefix

    @property
    def tokenizer_name(self) -> str:
        """Under which the library keeps prepared requests: the vocabulary, and the folder for its
        template.
        """
        return f"{self.subject.location} {self.tokenizer.hash}".replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids, BOS in front where the tokenizer's makers put one and it is not there already."""
        if add_special_tokens is False or not self.begins:
            return self.tokenizer.encode(string, allowed_special="all")
        if self.tokenizer.begin:
            return self.tokenizer.encode_prompt(string, allowed_special="all")
        return self.tokenizer.encode(string, add_bos=True, allowed_special="all")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, for the library's records; a text chooses one by name, as
        --chat-template.
        """
        if chat_template is False:
            return None
        if isinstance(chat_template, str):
            self.subject = replace(self.subject, chat_template=chat_template)
        sources = self._template().sources
        return sources.get(DEFAULT, next(iter(sources.values())))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without the head of an answer its last message is left
        open.
        """
        template = self._template()
        self._begun = not add_generation_prompt
        if add_generation_prompt:
            return template.render(chat_history)
        return template.render(chat_history, continue_final_message=True)

    def _template(self) -> ChatTemplate:
        template = self.subject.template
        if template is None:
            raise RequestError(
                f"{self.subject.location}: no chat template; valid only without "
                "--apply_chat_template"
            )
        self._chats = True
        return template

    # -- requests
    # ----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding says the same) of each continuation of its
        context.
        """
        windows = [
            continuation_window(context, rest, self.max_length) for _, context, rest in requests
        ]
        cut = sum(
            len(one.inputs) + 1 < len(a) + len(b)
            for one, (_, a, b) in zip(windows, requests, strict=True)
        )
        if cut:
            notice(
                f"{cut} of {len(windows)} contexts lost their beginning, longer than "
                f"{self.max_length} tokens"
            )
        out = [(0.0, False)] * len(windows)
        found = scored(self.subject.model, windows, self.batch_tokens, self.batch_rows)
        for index, one in tqdm(
            found, total=len(windows), disable=disable_tqdm, desc="loglikelihood"
        ):
            out[index] = (-one.nats, one.greedy)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], out[index])
        return out

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, every token once, with as much context as there is room
        for.

        As with `hf`, a tokenizer that puts a BOS in front of texts has it predicted too, behind the
        prefix.
        """
        pairs, counts = [], []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in rolling]
            pairs += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(pairs, disable_tqdm))
        totals = [sum(next(found)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the stop sequences; requests with the same settings are
        batched.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        out = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until")
        for indices in groups.values():
            prompts = [requests[index].args[0] for index in indices]
            settings = requests[indices[0]].args[1]
            for place, text in self._continued(prompts, settings):
                index = indices[place]
                out[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update()
        bar.close()
        return out

    def _continued(self, prompts: Sequence[str], settings: dict[str, Any]) -> Any:
        """Yield (index, text) of each prompt as it comes; of a chat the answer without its
        reasoning.
        """
        until, max_new_tokens, sampling = read_settings(settings, self.max_gen_toks)
        room = self.max_length - max_new_tokens
        require(
            room > 0,
            "max_gen_toks",
            max_new_tokens,
            f"expected below {self.max_length}, the model's length",
        )
        ids = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts]
        cut = sum(len(one) > room for one in ids)
        if cut:
            notice(f"{cut} of {len(ids)} prompts lost their beginning, longer than {room} tokens")
        stop_tokens, eos_id = [*self.subject.stop_tokens], self.tokenizer.eos_id
        if eos_id is not None:
            stop_tokens.append(eos_id)
            until.append(self.tokenizer.decode([eos_id], skip_special=False))
        markers: Markers | None = None
        kept: tuple[int, ...] = ()
        if self._chats:
            stop_tokens += self._template().stop_tokens
            markers = find_markers(self._template())
            kept = () if markers is None else markers.control_ids(self.tokenizer)
        done = complete_prompts(
            self.subject,
            [one[-room:] for one in ids],
            max_new_tokens=max_new_tokens,
            stop=until,
            stop_tokens=stop_tokens,
            sampling=sampling,
            batch_rows=self.batch_rows,
            kept=kept,
        )
        return ((index, split(one.text, markers, begun=self._begun)[1]) for index, one in done)

    def get_model_info(self) -> dict[str, Any]:
        """Hashes and dtype, for the library's records, under names that it does not use."""
        return {
            f"model_{name}": value
            for name, value in self.subject.facts().items()
            if name != "model"
        }


def read_settings(
    settings: dict[str, Any], max_gen_toks: int
) -> tuple[list[str], int, SamplingArgs]:
    """(stop sequences, new tokens at most, sampling) of a task's `generation_kwargs`; others are
    refused.
    """
    known = {"until", "do_sample", "num_beams", *NEW_TOKENS, *SAMPLING}
    for name in settings:
        require(
            name in known,
            f"generation_kwargs: {name}",
            settings[name],
            f"expected {', '.join(sorted(known))}",
        )
    beams = settings.get("num_beams", 1)
    require(beams == 1, "generation_kwargs: num_beams", beams, "expected 1")
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    limits = [settings[name] for name in NEW_TOKENS if settings.get(name) is not None]
    sampling = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    # As in lm_eval/models/utils.py: no `do_sample` means to sample where there is a temperature.
    if not settings.get("do_sample", float(sampling.get("temperature", 0.0)) > 0.0):
        sampling["temperature"] = 0.0
    return (
        [one for one in until if one],
        int(limits[0] if limits else max_gen_toks),
        SamplingArgs(**sampling),
    )


# -- running it
# -----------------------------------------------------------------------------------------------


def run_tasks(
    lm: TransomLM,
    names: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> tuple[dict[str, Any], str]:
    """(results as plain data, the library's table of them) of tasks by name, glob, or path of a
    .yaml file.
    """
    manager = TaskManager(include_path=include_path)
    tasks: list[str] = []
    for name in names:
        matches = [name] if Path(name).is_file() else manager.match_tasks([name])
        if not matches:
            known = manager.all_tasks
            raise RequestError(
                f"--tasks {name}: no such task in lm_eval {_version()}{nearest(name, known)}"
            )
        tasks += matches
    found = simple_evaluate(
        model=lm,
        tasks=list(dict.fromkeys(tasks)),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        task_manager=manager,
        log_samples=False,
    )
    kept = ("results", "groups", "n-shot", "n-samples")
    results = {name: found[name] for name in kept if name in found}
    versions = {"transom": __version__, "lm_eval": _version(), **machine()}
    return {**results, "task_versions": found["versions"], "versions": versions}, make_table(found)


def _version() -> str:
    return str(lm_eval.__version__)


def main() -> None:
    """The library's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    from transom.evaluation.harness import (
        main as run,  # where the class is registered under its own module
    )

    run()
elif NAME not in model_registry:  # it is there where the entry point has led here
    register_model(NAME)(TransomLM)

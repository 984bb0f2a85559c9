"""The model `transom` of lm-evaluation-harness (`lm_eval`).

    lm_eval --model transom --model_args pretrained=FOLDER --tasks hellaswag     # lm_eval > 0.4.13
    python -m transom.evaluation.harness --model transom --model_args pretrained=FOLDER ...

Newer versions of the library find the class by the entry point `lm_eval.models`. The second command
is for older ones: it runs their own command line with this model registered. Only this module
imports `lm_eval`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
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

from transom.base.errors import RequestError, expect, nearest, notice
from transom.base.runtime import machine
from transom.base.version import __version__
from transom.chat.files import DEFAULT
from transom.chat.reasoning import Markers, find_markers, split
from transom.chat.template import ChatTemplate
from transom.checkpoints.load import Offloader
from transom.evaluation.answers import complete_prompts
from transom.evaluation.bits import scored
from transom.evaluation.choices import continuation_window
from transom.evaluation.eval_model import EvalModel
from transom.inference.sampling import SamplingArgs

NAME = "transom"
# Names of the number of new tokens, the first of which counts.
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


class TransomLM(TemplateLM):
    """A model that answers requests as the library's own `hf` model does.

    Spellings of special tokens in texts are special tokens, since chat templates arrive as text.
    """

    def __init__(
        self,
        pretrained: str | EvalModel,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        chat_template: str | None = None,
        keep_quantized: bool | None = None,
        offload: Offloader | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        batch_tokens: int = 4096,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
    ) -> None:
        """Open a model, or take an open one.

        Args:
            pretrained: Model, run or adapter folder, hub id, or an open model.
            revision: As for `open_model`.
            device: As for `open_model`.
            dtype: As for `open_model`.
            chat_template: As for `open_model`.
            keep_quantized: As for `open_model`.
            offload: As for `open_model`.
            batch_size: The most rows of a batch; `auto` takes as many as `batch_tokens` hold.
            max_batch_size: The most rows of a batch if `batch_size` is `auto`.
            batch_tokens: Tokens of a forward pass that scores.
            max_length: The most tokens of a sequence; the model's `max_seq_len` by default.
            max_gen_toks: The most new tokens if a task does not give a number.
            add_bos_token: Whether texts begin with BOS; by default as the tokenizer does.

        Raises:
            RequestError: The model cannot be opened, or an argument is wrong.
        """
        super().__init__()
        if isinstance(pretrained, str):
            pretrained = EvalModel.open(
                pretrained,
                revision=revision,
                device=device or "auto",
                dtype=dtype,
                chat_template=chat_template,
                keep_quantized=keep_quantized,
                offload=offload,
            )
        rows = max_batch_size if str(batch_size).startswith("auto") else int(batch_size)
        expect(rows is None or rows >= 1, "batch_size", batch_size, "auto, or 1 or more")
        longest = pretrained.model.args.max_seq_len
        fits = max_length is None or 1 <= max_length <= longest
        expect(fits, "max_length", max_length, f"1 to {longest}, the model's max_seq_len")
        self.eval_model, self.tokenizer = pretrained, pretrained.tokenizer
        self.max_length = longest if max_length is None else max_length
        self.max_gen_toks = max_gen_toks
        self.batch_rows, self.batch_tokens = rows, batch_tokens
        self.begins = bool(self.tokenizer.begin) if add_bos_token is None else add_bos_token
        self._chats = False  # whether prompts are chats
        self._begun = False  # whether the answers of chats have begun
        self._device = pretrained.model.device

    # -- text and ids ------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos_id = self.tokenizer.eos_id
        if eos_id is None:
            raise RequestError(
                f"{self.eval_model.location}: tokenizer: expected one with an EOS token"
            )
        return eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        prefix = self.eval_model.prefix
        return self.eot_token_id if prefix is None else prefix

    @property
    def tokenizer_name(self) -> str:
        """The name under which the library keeps requests: folder (for its template) and hash."""
        return f"{self.eval_model.location} {self.tokenizer.hash}".replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, with BOS first if texts begin with it and it is not there."""
        if add_special_tokens is False or not self.begins:
            return self.tokenizer.encode(string, allowed_special="all")
        if self.tokenizer.begin:
            return self.tokenizer.encode_prompt(string, allowed_special="all")
        return self.tokenizer.encode(string, add_bos=True, allowed_special="all")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the template for the records; a text chooses one by name."""
        if chat_template is False:
            return None
        if isinstance(chat_template, str):
            self.eval_model = replace(self.eval_model, chat_template=chat_template)
        sources = self._template().sources
        return sources.get(DEFAULT, next(iter(sources.values())))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation, whose last message is open or followed by a prompt."""
        self._begun = not add_generation_prompt
        return self._template().render(chat_history, continue_final_message=self._begun)

    def _template(self) -> ChatTemplate:
        template = self.eval_model.template
        if template is None:
            where = self.eval_model.location
            raise RequestError(
                f"--apply_chat_template: {where} has no chat template; omit the flag"
            )
        self._chats = True
        return template

    # -- requests ----------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding gives it."""
        windows = [
            continuation_window(context, rest, self.max_length) for _, context, rest in requests
        ]
        self._notice_cut(
            len(one.inputs) + 1 < len(a) + len(b)
            for one, (_, a, b) in zip(windows, requests, strict=True)
        )
        out = [(0.0, False)] * len(windows)
        found = scored(self.eval_model.model, windows, self.batch_tokens, self.batch_rows)
        for index, one in tqdm(found, "loglikelihood", len(windows), disable=disable_tqdm):
            out[index] = (-one.nats, one.greedy)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], out[index])
        return out

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text, every token once, with as much context as fits.

        As with `hf`, a BOS at the start of a text is predicted too, after the prefix token.
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
        """Return the continuation of each prompt up to the first stop sequence.

        Requests with the same settings share batches.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        out = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for indices in groups.values():
                prompts = [requests[index].args[0] for index in indices]
                for place, text in self._continued(prompts, requests[indices[0]].args[1]):
                    index = indices[place]
                    out[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update()
        return out

    def _continued(
        self, prompts: Sequence[str], settings: dict[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """Yield the index and the continuation of each prompt; of a chat, the answer only."""
        until, max_new_tokens, sampling = read_settings(settings, self.max_gen_toks)
        room = self.max_length - max_new_tokens
        expected = f"less than {self.max_length}, the model's length"
        expect(room > 0, "max_gen_toks", max_new_tokens, expected)
        ids = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts]
        self._notice_cut(len(one) > room for one in ids)
        stop_tokens, eos_id = [*self.eval_model.stop_tokens], self.tokenizer.eos_id
        if eos_id is not None:
            stop_tokens.append(eos_id)
            until.append(self.tokenizer.decode([eos_id], skip_special=False))
        markers: Markers | None = None
        if self._chats:
            stop_tokens += self._template().stop_tokens
            markers = find_markers(self._template())
        done = complete_prompts(
            self.eval_model,
            [one[-room:] for one in ids],
            max_new_tokens=max_new_tokens,
            stop=until,
            stop_tokens=stop_tokens,
            sampling=sampling,
            batch_rows=self.batch_rows,
            kept=() if markers is None else markers.control_ids(self.tokenizer),
        )
        return ((index, split(one.text, markers, begun=self._begun)[1]) for index, one in done)

    def _notice_cut(self, cut: Iterable[bool]) -> None:
        flags = list(cut)
        if any(flags):
            notice(f"{sum(flags)} of {len(flags)} sequences did not fit and lost their beginning")

    def get_model_info(self) -> dict[str, Any]:
        """Return hashes and dtype for the library's records, under names that it does not use."""
        return {
            f"model_{name}": one for name, one in self.eval_model.facts().items() if name != "model"
        }


def read_settings(
    settings: dict[str, Any], max_gen_toks: int
) -> tuple[list[str], int, SamplingArgs]:
    """Return stop sequences, the most new tokens and sampling of a task's `generation_kwargs`.

    Raises:
        RequestError: There is a setting that has no effect here.
    """
    known = ("until", "do_sample", "num_beams", *NEW_TOKENS, *SAMPLING)
    for name, value in settings.items():
        expected = f"one of {', '.join(sorted(known))}"
        expect(name in known, f"generation_kwargs: {name}", value, expected)
    beams = settings.get("num_beams", 1)
    expect(beams == 1, "generation_kwargs: num_beams", beams, "1")
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    limits = [settings[name] for name in NEW_TOKENS if settings.get(name) is not None]
    sampling = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    # As in lm_eval/models/utils.py: without `do_sample`, a temperature means to sample.
    if not settings.get("do_sample", float(sampling.get("temperature", 0.0)) > 0.0):
        sampling["temperature"] = 0.0
    count = int(limits[0] if limits else max_gen_toks)
    return [one for one in until if one], count, SamplingArgs(**sampling)


# -- tasks -----------------------------------------------------------------------------------------


def run_tasks(
    lm: TransomLM,
    names: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> tuple[dict[str, Any], str]:
    """Run tasks of the library and return their results as plain data, and as the library's table.

    Args:
        lm: The model.
        names: Names of tasks, globs, or paths of .yaml files.
        include_path: A folder of more tasks.
        num_fewshot: Examples before each question; by default as the task says.
        limit: The first rows of each task only.
        apply_chat_template: Whether prompts are written with the chat template.

    Raises:
        RequestError: There is no such task.
    """
    manager = TaskManager(include_path=include_path)
    tasks: list[str] = []
    for name in names:
        matches = [name] if Path(name).is_file() else manager.match_tasks([name])
        expected = f"a task of lm_eval {_version()}{nearest(name, manager.all_tasks)}"
        expect(bool(matches), "--tasks", name, expected)
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
    """Run the library's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    from transom.evaluation.harness import main as run  # registers the class under this module

    run()
elif NAME not in model_registry:  # it is registered if the entry point imported this module
    register_model(NAME)(TransomLM)

"""A foreign config that records which of its keys were read, so that no key is dropped without
a notice. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transom.base.errors import RequestError, expect, explained, located, notice
from transom.base.files import refuse_infinite
from transom.config.model_args import ModelArgs

# Keys that do not change the numbers that a model computes, or that repeat what another key says.
_HARMLESS = (
    "_attn_implementation _attn_implementation_autoset _model_name_or_path _name_or_path "
    "_sliding_window_pattern architectures attn_implementation auto_map aux_loss_alpha "
    "begin_suppress_tokens boi_token_id boi_token_index bos_token_id cache_implementation "
    "chunk_size_feed_forward decoder_start_token_id dtype eoi_token_id eoi_token_index "
    "eos_token_id ep_size for_llm_compressor forced_bos_token_id id2label initializer_range "
    "is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id max_length "
    "mm_tokens_per_image model_type num_nextn_predict_layers output_attentions "
    "output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type "
    "qk_head_dim return_dict sep_token_id seq_aux task_specific_params tokenizer_class "
    "torch_dtype transformers_version transformers_weights unk_token_id use_cache"
)
# Settings of generation that older files keep in config.json.
OLDER_SETTINGS = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "max_length", "max_new_tokens", "min_length", "num_beams"),
)
HARMLESS = frozenset((*_HARMLESS.split(), *OLDER_SETTINGS))
# Keys that act in training only; a value other than 0 is printed and not taken over.
TRAINING_ONLY = (
    *("attention_dropout", "embd_pdrop", "hidden_dropout", "projector_dropout", "resid_pdrop"),
    "router_jitter_noise",
)


class ForeignConfig:
    """The keys of one config file, or of a part of it, over the defaults of its config class.

    Args:
        data: the parsed file. Numbers that are not finite are a `RequestError`.
        where: the file, and the part of it, for messages.
        defaults: what the config class has where the file does not name the key.
    """

    def __init__(self, data: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        refuse_infinite(data, where)
        self.where, self._data, self._defaults = where, data, defaults
        self._read: set[str] = set()
        self._notes: list[str] = []
        self._parts: list[ForeignConfig] = []

    def __getitem__(self, key: str) -> Any:
        """Return the value, null included. Raise `RequestError` if neither the file nor its
        class has the key.
        """
        self._read.add(key)
        if key in self._data:
            return self._data[key]
        if key not in self._defaults:
            raise RequestError(f"{self.where}: {key}: missing; expected a value")
        return self._defaults[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value, or `default` if it is null, or if neither the file nor its class
        has the key.
        """
        self._read.add(key)
        value = self._data.get(key, self._defaults.get(key))
        return default if value is None else value

    def expect(self, key: str, *supported: Any) -> None:
        """Raise `RequestError` for a value that is not supported. A missing key means the first
        supported one.
        """
        words = " or ".join(repr(value) for value in supported)
        self.check(self.get(key, supported[0]) in supported, key, words)

    def note_ignored(self, key: str) -> None:
        """Note a key that is on in the file although transformers ignores it in this family."""
        if self.get(key):
            self.note(f"{key} = {self.get(key)!r} is ignored, as in transformers")

    def assumed(self, key: str, reason: str = "") -> Any:
        """Return the value; if the file does not state it, keep a note about the default."""
        if key not in self._data:
            self.note(f"{key} = {self[key]:g} is assumed, as the file does not state it{reason}")
        return self[key]

    def note(self, line: str) -> None:
        """Keep a line for `print_notes`."""
        self._notes.append(line)

    def check(self, condition: bool, key: str, expected: str) -> None:
        """Raise `RequestError` with the key and its value unless `condition` holds."""
        expect(condition, f"{self.where}: {key}", self.get(key), expected)

    def refuse_quantized(self, key: str, kind: str) -> None:
        """Raise `RequestError` if `key` states a quantization, which its own key `kind` names."""
        value = self.get(key)
        name = value.get(kind, value) if isinstance(value, Mapping) else value
        expect(not value, f"{self.where}: {key}", name, "weights that are not quantized")

    def model(self, read: Callable[[ForeignConfig], dict[str, Any]], format: str) -> ModelArgs:
        """Return the model with the fields that `read` returns for this config, by dotted path.

        Errors of `ModelArgs` name the file, and whatever `read` raises on a file that is no config
        of `format`, as with text in place of a number, becomes a `RequestError`.
        """
        kinds = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError)
        with explained(f"{self.where}: not a {format}", *kinds):
            found = read(self)
        fields: dict[str, Any] = {}
        for path, value in found.items():
            part, _, name = path.rpartition(".")
            (fields.setdefault(part, {}) if part else fields)[name] = value
        with located(self.where):
            made = ModelArgs.from_dict(fields)
        return made

    def part(self, key: str, defaults: Mapping[str, Any]) -> ForeignConfig:
        """Return a nested config such as `text_config`; its notes are printed with the others."""
        value = self[key]
        self.check(isinstance(value, Mapping), key, "a mapping")
        self._parts.append(ForeignConfig(value, f"{self.where}: {key}", defaults))
        return self._parts[-1]

    def print_notes(self) -> None:
        """Print the notes, then the training settings that were not taken over, then the keys
        that were not read; those of parts come first.
        """
        for part in self._parts:
            part.print_notes()
        for line in self._notes:
            notice(f"{self.where}: {line}")
        dropped = [f"{key} = {self._data[key]!r}" for key in TRAINING_ONLY if self._data.get(key)]
        if dropped:
            notice(f"{self.where}: training settings not taken over: {', '.join(dropped)}")
        unread = sorted(set(self._data) - self._read - HARMLESS - set(TRAINING_ONLY))
        if unread:
            notice(f"{self.where}: keys not read: {', '.join(unread)}")

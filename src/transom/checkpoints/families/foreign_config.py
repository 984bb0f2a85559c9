"""A Hugging Face config that remembers which of its keys were read, so that none is passed over in
silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.base.errors import RequestError, notice, require
from transom.base.files import refuse_infinite

# Keys that say nothing about the numbers a model computes, or repeat what another key says.
_HARMLESS = """
_attn_implementation _attn_implementation_autoset _model_name_or_path _name_or_path
_sliding_window_pattern
architectures attn_implementation auto_map aux_loss_alpha begin_suppress_tokens boi_token_id
boi_token_index
bos_token_id cache_implementation chunk_size_feed_forward decoder_start_token_id dtype eoi_token_id
eoi_token_index eos_token_id ep_size for_llm_compressor forced_bos_token_id id2label
initializer_range is_decoder
is_encoder_decoder keys_to_ignore_at_inference label2id max_length mm_tokens_per_image model_type
num_nextn_predict_layers output_attentions output_hidden_states output_router_logits pad_token_id
problem_type
qk_head_dim return_dict sep_token_id seq_aux task_specific_params tokenizer_class torch_dtype
transformers_version
transformers_weights unk_token_id use_cache
"""
# Settings of generation, which older files keep here; `companions` reads them.
OLDER_SETTINGS = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "max_length", "max_new_tokens", "min_length", "num_beams"),
)
HARMLESS = frozenset((*_HARMLESS.split(), *OLDER_SETTINGS))
# Keys of training alone, with the value at which they do nothing; another value is said and not
# taken over.
TRAINING_ONLY: dict[str, Any] = {
    "attention_dropout": 0,
    "embd_pdrop": 0,
    "hidden_dropout": 0,
    "projector_dropout": 0,
    "resid_pdrop": 0,
    "router_jitter_noise": 0,
}


class ForeignConfig:
    """The keys of one config file (or of a part of it), over the defaults its class has where a
    file is silent.
    """

    def __init__(self, data: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        refuse_infinite(data, where)
        self.where, self._data, self._defaults = where, data, defaults
        self._read: set[str] = set()
        self._notes: list[str] = []

    def __getitem__(self, key: str) -> Any:
        """The value, null included; a key that neither the file nor its class has is a
        `RequestError`.
        """
        self._read.add(key)
        if key in self._data:
            return self._data[key]
        if key not in self._defaults:
            raise RequestError(f"{self.where}: {key!r} is missing; expected a whole config.json")
        return self._defaults[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where file and class say nothing or null."""
        self._read.add(key)
        value = self._data.get(key, self._defaults.get(key))
        return default if value is None else value

    def plain(self, key: str, *accepted: Any) -> None:
        """Refuse any value but those of `accepted`; an absent or null key is as the first of
        them.
        """
        words = " or ".join(repr(value) for value in accepted)
        self.check(self.get(key, accepted[0]) in accepted, key, f"expected {words}")

    def ignored(self, *keys: str) -> None:
        """Note each key that is on in the file, which transformers ignores in this family."""
        for key in keys:
            if self.get(key):
                self.note(f"{key} = {self.get(key)!r} is ignored, as in transformers")

    def note(self, line: str) -> None:
        """Keep a line for `say_unread` to print."""
        self._notes.append(line)

    def check(self, condition: bool, key: str, accepted: str) -> None:
        """`require` for one key of this file."""
        require(condition, f"{self.where}: {key}", self.get(key), accepted)

    def part(self, key: str, defaults: Mapping[str, Any]) -> ForeignConfig:
        """A nested config, such as `text_config`."""
        value = self[key]
        self.check(isinstance(value, Mapping), key, "expected a mapping")
        return ForeignConfig(value, f"{self.where}: {key}", defaults)

    def say_unread(self) -> None:
        """Print the notes, one line for keys that nobody read, and one for training settings not
        taken over.
        """
        for line in self._notes:
            notice(f"{self.where}: {line}")
        dropped = [
            f"{key} = {self._data[key]!r}"
            for key, nothing in TRAINING_ONLY.items()
            if (self._data.get(key) or nothing) != nothing
        ]
        if dropped:
            notice(f"{self.where}: training settings not taken over: {', '.join(dropped)}")
        unread = sorted(set(self._data) - self._read - HARMLESS - set(TRAINING_ONLY))
        if unread:
            notice(f"{self.where}: keys not read: {', '.join(unread)}")

"""Chat templates as models are published with them, and conversations for them."""

# ruff: noqa: RUF001 - the bars of DeepSeek's control tokens are wide ones
import json
import logging
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import train_bpe

FOLDER = Path(__file__).parent / "published_templates"
PUBLISHED = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
READS_TOOLS = ("llama3.1", "qwen2.5", "mistral-v3")

SPECIAL = (
    "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|start|>", "<|message|>", "<|channel|>",
    "<|call|>", "<|return|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)  # fmt: skip


def say(role, content, **more):
    """One message."""
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "one": [say("user", "Hello there")],
    "system": [
        say("system", "  Be brief.\n"),
        say("user", "Hi"),
        say("assistant", "Yes?"),
        say("user", "Why?"),
    ],
    "many": [
        say("user", " Grüße, 世界! 👩‍👩‍👧 e\u0301 \u202e "),
        say("assistant", "\n\nNaïve <b>text</b> & 'quotes' \"\\n\"  "),
        say("user", "{{ messages }} {% raw %} <think>x</think>"),
        say("assistant", "<think>\nhm\n</think>\n\nDone 🤖"),
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's weather: <hot> & cold, für alle",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "weather", "arguments": {"city": "Köln"}},
}
TOOL_TALK = [
    say("user", "Weather in Köln?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    say("tool", '{"warm": true}', tool_call_id="abcdefghi", name="weather"),
    say("assistant", "Warm."),
]
TEXT = json.dumps([*CONVERSATIONS.values(), TOOLS, TOOL_TALK], ensure_ascii=False) * 3


def tokenizer_pair(folder):
    """A tokenizer with the control tokens of all families, here and in transformers; its files are
    in `folder`.
    """
    train_bpe([TEXT], 500, SPECIAL).save(folder)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)

"""Reads tokenizers with the transformers of this Python: `read_tokenizer.py FOLDER…`.

Prints a JSON object: for each folder what it makes of some texts and of a conversation.
"""

import json
import sys
from typing import Any

TEXTS = (
    "Hello  world 12",
    "there was",
    "\n\n- wörld,\t日本語 🙂",
    "<|im_start|>user\nhi<|im_end|></s>",
    "<s>User: hi</s>\n\nAssistant: [INST] x [/INST] y",
    " x\r\n\u200d\u0301ﬁ  ",
    "[CLS] a [MASK]<new>b <new> c",
    "<\uff5cUser\uff5c>hi",
    "",
)
MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    },
)
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def describe(tokenizer: Any) -> dict[str, Any]:
    """Returns ids, texts and renderings that every reader of the same files must agree on."""
    ids = [tokenizer(text).input_ids for text in TEXTS]
    return {
        "ids": ids,
        "ids alone": [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS],
        "texts": [tokenizer.decode(row) for row in ids],
        "texts without special": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "length": len(tokenizer),
        "special": {name: getattr(tokenizer, f"{name}_token") for name in NAMES},
        "templates": tokenizer.chat_template,
        "rendered": render(tokenizer),
        "rendered with tools": render(tokenizer, tools=list(TOOLS)),
    }


def render(tokenizer: Any, **options: Any) -> str | None:
    """Returns the conversation as the chat template writes it, if there is one."""
    if not tokenizer.chat_template:
        return None
    return tokenizer.apply_chat_template(list(MESSAGES), tokenize=False, **options)


if __name__ == "__main__":
    from transformers import AutoTokenizer

    read = {name: describe(AutoTokenizer.from_pretrained(name)) for name in sys.argv[1:]}
    json.dump(read, sys.stdout)

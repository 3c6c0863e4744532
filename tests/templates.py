"""Chat templates that write history, reasoning and calls in the ways that published ones do."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Channels, calls with an end of their own, another end in history: as gpt-oss has them.
HARMONY = (
    "{%- set ns = namespace(name='') -%}"
    "{%- for m in messages -%}"
    "{%- set reasoning = m.thinking or m.reasoning_content or '' -%}"
    "{%- set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant')"
    " | rejectattr('tool_calls') | list -%}"
    "{%- if m.role == 'assistant' and m.tool_calls -%}"
    "{%- set ns.name = m.tool_calls[0].function.name -%}"
    "{%- if reasoning and not later -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + reasoning + '<|end|>' -}}"
    "{%- endif -%}"
    "{{- '<|start|>assistant to=functions.' + ns.name + '<|channel|>commentary<|message|>' -}}"
    "{{- m.tool_calls[0].function.arguments | tojson + '<|call|>' -}}"
    "{%- elif m.role == 'assistant' -%}"
    "{%- if reasoning and loop.last and not add_generation_prompt -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + reasoning + '<|end|>' -}}"
    "{%- endif -%}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}"
    "{%- elif m.role == 'tool' -%}"
    "{{- '<|start|>functions.' + ns.name + ' to=assistant<|message|>' + m.content + '<|end|>' -}}"
    "{%- else -%}"
    "{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- for t in tools or [] -%}{{- '' if messages else t.function.name -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
)
# The last answer has notes before it that end with what ends earlier answers.
NOTES = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}"
    "{%- if loop.last -%}"
    "{{- '<|assistant|>notes: ' + (m.reasoning_content or 'none') + '<|end|>' -}}"
    "{{- '<|assistant|>answer: ' + m.content + '<|endoftext|>' -}}"
    "{%- else -%}{{- '<|assistant|>answer: ' + m.content + '<|end|>' -}}{%- endif -%}"
    "{%- else -%}{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '' -}}{%- endif -%}"
)
# A block before the last answer, empty without reasoning: as Qwen3 has it.
BLOCK = (
    "{%- for m in messages -%}"
    "{{- '<|' + m.role + '|>' -}}"
    "{%- if m.role == 'assistant' and loop.last -%}"
    "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' -}}"
    "{%- endif -%}"
    "{{- m.content + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# Roles and nothing else: as Llama 3 and Phi-3 have it. An end of text behind the conversation.
PLAIN = (
    "{%- for m in messages -%}"
    "{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}"
    "{%- endif -%}"
)
SPECIAL = (
    "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|> <|system|> <|user|> "
    "<|assistant|> <|tool|>"
).split()
# Trims, has tools and their results: as Llama 3 has them.
TOOLS = (
    "{%- for t in tools or [] -%}{{- t | tojson -}}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{{- '<|start|>' + m.role + '<|message|>\\n\\n' -}}"
    "{%- for c in m.tool_calls or [] -%}"
    "{{- '<tool_call>' + c.function.name + c.function.arguments | tojson -}}"
    "{%- endfor -%}"
    "{{- m.content | trim + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant<|message|>\\n\\n' -}}{%- endif -%}"
)
# Trims, writes the date, moves tools into the first question; one call a turn.
LLAMA3 = (
    "{{- bos_token -}}"
    "{%- if not date_string is defined -%}{%- if strftime_now is defined -%}"
    "{%- set date_string = strftime_now('%d %b %Y') -%}{%- else -%}"
    "{%- set date_string = '26 Jul 2024' -%}{%- endif -%}{%- endif -%}"
    "{%- set in_user = tools_in_user_message if tools_in_user_message is defined else true -%}"
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content | trim -%}"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}"
    "{%- if tools -%}{{- 'Environment: ipython\n' -}}{%- endif -%}"
    "{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' -}}"
    "{{- system + '<|eot_id|>' -}}"
    "{%- if tools and in_user -%}"
    "{%- set first = messages[0].content | trim -%}{%- set messages = messages[1:] -%}"
    "{{- '<|start_header_id|>user<|end_header_id|>\n\nUse these functions.\n\n' -}}"
    "{%- for t in tools -%}{{- t | tojson(indent=4) + '\n\n' -}}{%- endfor -%}"
    "{{- first + '<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if not (m.role in ['tool', 'ipython'] or m.tool_calls) -%}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim -}}"
    "{{- '<|eot_id|>' -}}"
    "{%- elif m.tool_calls -%}"
    "{%- if m.tool_calls | length != 1 -%}"
    "{{- raise_exception('one call at a time') -}}{%- endif -%}"
    "{%- set call = m.tool_calls[0].function -%}"
    '{{- \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + call.name -}}'
    "{{- '\", \"parameters\": ' + call.arguments | tojson + '}<|eot_id|>' -}}"
    "{%- else -%}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' -}}"
    "{%- if m.content is mapping or m.content is iterable -%}{{- m.content | tojson -}}"
    "{%- else -%}{{- m.content -}}{%- endif -%}"
    "{{- '<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}"
    "{%- endif -%}"
)
# The system and the tools stand in the last question.
MISTRAL = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set loop_messages = messages -%}"
    "{%- endif -%}"
    "{%- set last = (loop_messages | selectattr('role', 'equalto', 'user') | list)[-1] -%}"
    "{{- bos_token -}}"
    "{%- for m in loop_messages -%}"
    "{%- if m.role == 'user' -%}"
    "{%- if tools and m == last -%}"
    "{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}"
    "{%- if m == last and system is defined -%}"
    "{{- '[INST]' + system + '\n\n' + m.content + '[/INST]' -}}"
    "{%- else -%}{{- '[INST]' + m.content + '[/INST]' -}}{%- endif -%}"
    "{%- elif m.tool_calls -%}"
    "{{- '[TOOL_CALLS][' -}}"
    "{%- for c in m.tool_calls -%}"
    '{{- \'{"name": "\' + c.function.name -}}'
    '{{- \'", "arguments": \' + c.function.arguments | tojson -}}'
    "{{- '}' + ('' if loop.last else ', ') -}}"
    "{%- endfor -%}{{- ']' + eos_token -}}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content | trim + eos_token -}}"
    "{%- elif m.role == 'tool' -%}"
    "{{- '[TOOL_RESULTS]{\"content\": ' + m.content + '}[/TOOL_RESULTS]' -}}"
    "{%- else -%}{{- raise_exception('only user, assistant and tool') -}}{%- endif -%}"
    "{%- endfor -%}"
)
# Knows no system, and raises where roles do not alternate.
GEMMA = (
    "{{- bos_token -}}"
    "{%- if messages[0].role == 'system' -%}"
    "{{- raise_exception('System role not supported') -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate') -}}{%- endif -%}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' -}}"
    "{{- m.content | trim + '<end_of_turn>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
# Gemma 3 puts the system's text in front of the first question.
GEMMA3 = GEMMA.replace(
    "{{- raise_exception('System role not supported') -}}",
    "{%- set prefix = messages[0].content + '\n\n' -%}{%- set messages = messages[1:] -%}",
).replace(
    "{{- m.content | trim",
    "{{- (prefix if loop.first and prefix is defined else '') + m.content | trim",
)
# Leaves out other roles; an end of text behind the conversation.
PHI3 = (
    "{%- for m in messages -%}"
    "{%- if m.role in ('system', 'user', 'assistant') -%}"
    "{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}"
    "{%- else -%}{{- eos_token -}}{%- endif -%}"
)
# A system of its own where there is none.
CHATML = (
    "{%- for m in messages -%}"
    "{%- if loop.first and m.role != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# All systems first; the reasoning of every answer is left out.
DEEPSEEK = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for m in messages if m.role == 'system' -%}{%- set ns.system = ns.system + m.content -%}"
    "{%- endfor -%}"
    "{{- bos_token + ns.system -}}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{- '<|user|>' + m.content -}}"
    "{%- elif m.role == 'assistant' -%}"
    "{{- '<|assistant|>' + m.content.split('</think>')[-1] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# Llama 2 as it was published: strips, and writes BOS before every question.
LLAMA2 = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content"
    " if loop.first and system is defined else m.content -%}"
    "{%- if m.role == 'user' -%}{{- bos_token + '[INST] ' + text | trim + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + text | trim + ' ' + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
# Numbers its turns.
NUMBERED = (
    "{%- for m in messages -%}"
    "{{- '<|' + m.role + '|>' + loop.index | string + ': ' + m.content + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|assistant|>' + (messages | length + 1) | string + ': ' -}}{%- endif -%}"
)
# Begins with the number of messages, which is another one in each prompt.
COUNTED = "{{- messages | length | string -}}" + PHI3
# The system stands behind the last message.
SYSTEM_LAST = (
    "{%- for m in messages if m.role != 'system' -%}"
    "{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endfor -%}"
    "{%- for m in messages if m.role == 'system' -%}"
    "{{- '<|system|>' + m.content + '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
FAMILY_SPECIAL = (
    "<|start_header_id|> <|end_header_id|> <|eot_id|> [INST] [/INST] [TOOL_CALLS] "
    "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] <start_of_turn> "
    "<end_of_turn> <|im_start|> <|im_end|>"
).split()


def byte_tokenizer():
    """A tokenizer of bytes, so that what is decoded is what was encoded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    found.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        additional_special_tokens=[*SPECIAL, *FAMILY_SPECIAL],
        clean_up_tokenization_spaces=False,
    )

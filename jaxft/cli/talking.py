"""Commands that let a model speak: generate, chat."""

import argparse
import sys

import jaxft
from jaxft.cli.common import refuse_several
from jaxft.errors import ConfigError


def generate(options: argparse.Namespace) -> int:
    """Continues texts or answers questions."""
    refuse_several("generate")
    if options.raw and (options.system or options.tools or options.messages):
        raise ConfigError("--raw continues a text: it takes no --system, --tools or --messages.")
    if options.prompt and options.messages:
        raise ConfigError("--prompt and --messages both say what to ask; give one.")
    from jaxft.programs import questions

    tools = questions.read_tools(options.tools) if options.tools else None
    texts, asked = [], []
    if options.messages:
        asked = questions.from_file(options.messages, system=options.system, tools=tools)
    else:
        texts = options.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not texts:
            raise ConfigError(
                "There is no prompt: standard input has no line with text. Give --prompt=…, "
                "--messages=FILE, or a line for each prompt."
            )
    if not options.raw and not options.messages:
        asked = questions.from_prompts(texts, system=options.system, tools=tools)
    sampling = _sampling(options)
    model = _load(options)
    needs_template = options.messages or options.system or tools
    template = getattr(model.tokenizer, "chat_template", None)  # there may be no tokenizer
    if options.raw or not (template or needs_template):
        asked = []
    if asked:
        answers = model.generate_from_ids(
            [question.prompt_ids(model) for question in asked],
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
        )
        lines = [f"{q.text}\n  {answer}" for q, answer in zip(asked, answers, strict=True)]
    else:
        answers = model.generate(
            texts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
        lines = [text + answer for text, answer in zip(texts, answers, strict=True)]
    for line in lines:
        print(line)
    return 0


def chat(options: argparse.Namespace) -> int:
    """Talks with a model in the terminal."""
    refuse_several("chat")
    from jaxft.programs import questions, terminal

    tools = questions.read_tools(options.tools) if options.tools else None
    sampling = _sampling(options)
    model = _load(options)
    terminal.run(
        terminal.Chat(
            model,
            system=options.system,
            tools=tools,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
        )
    )
    return 0


def _load(options: argparse.Namespace):
    return jaxft.load(
        options.model,
        step=options.step,
        base=options.base,
        dtypes=options.dtypes,
        quantise=options.quantise,
    )


def _sampling(options: argparse.Namespace):
    from jaxft.programs.sampling import Sampling

    if options.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens={options.max_new_tokens}; expected at least 1.")
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    if not sampling.temperature and (sampling.top_k or sampling.top_p < 1):
        raise ConfigError(
            "--top_k and --top_p limit what is drawn, and --temperature=0 draws nothing; set "
            "--temperature=1 or another above 0."
        )
    return sampling

"""The chat: history, commands, interrupts and what happens when the context is full."""

import functools
import io
import sys

import pytest

import jaxft
from jaxft import cli
from jaxft.demo import BASE
from jaxft.errors import JaxftError
from jaxft.programs import decoding
from jaxft.programs.generate import Sampling
from jaxft.programs.terminal import Chat, talk

HELLO, AGAIN = "My knee hurts.", "And my ear?"


@functools.cache
def model():
    return jaxft.load(BASE)


def chat_of(**options) -> Chat:
    return Chat(model(), max_new_tokens=16, **options)


def said(chat: Chat, *lines, interrupt_at: str = "") -> str:
    """Returns what a user sees who enters the lines; each may be an exception."""
    left = list(lines)
    seen: list[str] = []
    interrupts: list[str] = []

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(text: str) -> None:
        seen.append(text)
        if interrupt_at and interrupt_at in seen[-1]:
            interrupts.append(seen[-1])
            if len(interrupts) == 1:
                raise KeyboardInterrupt

    talk(chat, read=read, write=write)
    return "".join(seen)


def test_an_answer_is_that_of_generate_with_the_history_before_it():
    chat = chat_of()
    text = said(chat, HELLO, "", AGAIN)
    history = [{"role": "user", "content": HELLO}]
    first = model().generate(history, max_new_tokens=16)
    history += [{"role": "assistant", "content": first}, {"role": "user", "content": AGAIN}]
    second = model().generate(history, max_new_tokens=16)
    assert text == f"{first}\n{second}\n\n"
    assert [m["content"] for m in chat.messages] == [HELLO, first, AGAIN, second]


@pytest.mark.slow(seconds=5)
def test_turns_draw_anew_and_a_reset_begins_with_the_seed():
    sampling = Sampling(temperature=3.0, seed=5)
    chat = chat_of(sampling=sampling)
    first, second = ("".join(chat.answer(HELLO)) for _ in range(2))
    assert first != second
    chat.reset()
    again = "".join(chat.answer(HELLO))
    assert first == again
    other = model().generate(
        [{"role": "user", "content": HELLO}], max_new_tokens=16, temperature=3.0, seed=5
    )
    assert first == other


def test_commands():
    chat = chat_of(system="Be brief.")
    text = said(chat, HELLO, "/system", "/reset", "/sistem x", "/help", "/quit", "never read")
    assert "Be brief.\nA new conversation.\n" in text
    assert "no command '/sistem'. Did you mean '/system'?" in text
    assert "Ctrl-C stops an answer" in text
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    said(chat, HELLO, "/system Be kind.", "/system")
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


def test_a_line_that_ends_in_a_backslash_goes_on():
    chat = chat_of()
    said(chat, "one\\", "two")
    assert chat.messages[0]["content"] == "one\ntwo"


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said():
    chat = chat_of()
    whole = "".join(chat_of().answer(HELLO))
    text = said(chat, HELLO, AGAIN, interrupt_at="I see")
    assert text.startswith("I see") and " [stopped]\n" in text
    kept = chat.messages[1]["content"]
    assert whole.startswith(kept) and kept != whole
    second = model().generate(chat.messages[:3], max_new_tokens=16)
    assert chat.messages[3]["content"] == second


def test_an_interrupt_at_the_prompt_says_how_to_leave():
    assert "/quit leaves" in said(chat_of(), KeyboardInterrupt(), "/quit")


def test_a_full_context_is_said_and_the_message_forgotten():
    chat = chat_of()
    limit = chat.limit
    long = "knee " * limit
    text = said(chat, long, HELLO)
    assert "The context is full: with this message the conversation has" in text
    assert f"the model takes {limit}. /reset begins anew" in text
    assert chat.messages[0]["content"] == HELLO
    filler = "knee "
    while limit - len(model().prompt_ids([{"role": "user", "content": filler}])) > 2:
        filler += "knee "
    chat = Chat(model(), max_new_tokens=16, sampling=Sampling(temperature=9.0))
    "".join(chat.answer(filler))
    assert f"the context of {limit} tokens is full" in chat.note


def test_an_answer_that_is_cut_says_so():
    chat = Chat(model(), max_new_tokens=1)
    "".join(chat.answer(HELLO))
    assert chat.note == "[cut after 1 tokens; --max_new_tokens allows more]"


def test_what_the_template_refuses_is_said():
    chat = chat_of(tools=[{"type": "function", "function": {"name": "clock"}}])
    with pytest.raises(JaxftError, match="'clock' does not occur in the prompt"):
        next(chat.answer(HELLO))
    assert chat.messages == []


def test_lines_of_a_pipe_are_answered(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{HELLO}\n/quit\n"))
    assert cli.main(["chat", f"--model={BASE}", "--max_new_tokens=16"]) == 0
    answer = model().generate([{"role": "user", "content": HELLO}], max_new_tokens=16)
    assert capsys.readouterr().out.startswith(answer)


def test_a_long_chat_compiles_nothing_new():
    def compiled() -> tuple[int, int]:
        return decoding.read_tokens._cache_size(), decoding.decode_tokens._cache_size()

    chat = chat_of()
    said(chat, HELLO, "Ear?")  # a whole prompt, and a short addition to it
    before = compiled()
    said(chat, *["Ear?"] * 6)
    assert compiled() == before

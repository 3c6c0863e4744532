"""A chat in the terminal: answers appear as they are generated, and history is kept."""

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

from jaxft.errors import JaxftError, nearest
from jaxft.programs.model import Model
from jaxft.programs.questions import Question
from jaxft.programs.sampling import Sampling
from jaxft.programs.streaming import text_pieces

_HELP = """\
/system TEXT  set the system message and begin anew; without a text: show it
/reset        forget the conversation
/quit         leave; so does Ctrl-D
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""
_COMMANDS = ("/system", "/reset", "/quit", "/exit", "/help")


class Chat:
    """A conversation with a model.

    Args:
      model: Answers through its chat template.
      system: System message; empty for none.
      tools: Function descriptions offered to the model.
      max_new_tokens: Longest answer.
      sampling: How tokens are chosen; each turn draws anew from the seed.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str = "",
        tools: list[Any] | None = None,
        max_new_tokens: int = 1024,
        sampling: Sampling | None = None,
    ):
        self.model, self.tools, self.max_new_tokens = model, tools, max_new_tokens
        self.sampling = sampling or Sampling()
        self.session = model.session()
        self.limit = model.architecture.config.max_length
        self.system = system
        self.note = ""
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Begins a new conversation, with another system message if one is given."""
        self.system = self.system if system is None else system
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.turns = 0

    def answer(self, text: str) -> Generator[str]:
        """Yields the answer to a message in pieces; then `note` says why it is cut, if it is.

        An iterator that is left early keeps what it gave. A message that cannot be answered is
        forgotten.

        Raises:
          JaxftError: If the conversation does not fit the context, or the template refuses it.
        """
        self.note = ""
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = Question(asked, self.tools).prompt_ids(self.model)
        room = self.limit - len(ids)
        if room < 1:
            raise JaxftError(
                f"The context is full: with this message the conversation has {len(ids)} tokens, "
                f"and the model takes {self.limit}. /reset begins anew."
            )
        self.messages = asked
        self.turns += 1
        pieces: list[str] = []
        try:
            for piece in self._pieces(ids, min(room, self.max_new_tokens)):
                pieces.append(piece)
                yield piece
            if not self.session.ended:
                self.note = self._cut(room)
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _pieces(self, ids: list[int], most: int) -> Iterator[str]:
        sampling = Sampling(
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            seed=self.sampling.seed + self.turns - 1,
        )
        new = self.session.generate(
            ids, max_new_tokens=most, stop_ids=self.model.stop_ids, sampling=sampling
        )
        return text_pieces(self.model.tokenizer, new)

    def _cut(self, room: int) -> str:
        if room <= self.max_new_tokens:
            return f"[cut: the context of {self.limit} tokens is full; /reset begins anew]"
        return f"[cut after {self.max_new_tokens} tokens; --max_new_tokens allows more]"


def talk(chat: Chat, *, read: Callable[[str], str] = input, write: Callable[[str], Any]) -> None:
    """Reads messages and commands, and writes answers, until the input ends.

    Args:
      chat: The conversation.
      read: Returns a line and raises `EOFError` at the end; takes the prompt to show.
      write: Takes pieces of text.
    """
    while True:
        try:
            text = _message(read)
        except KeyboardInterrupt:
            write("\n(Ctrl-D or /quit leaves)\n")
            continue
        except EOFError:
            write("\n")
            return
        command, _, rest = text.strip().partition(" ")
        if not text.strip():
            continue
        if command in ("/quit", "/exit") and not rest:
            return
        if text.startswith("/"):
            write(_obey(chat, command, rest.strip()) + "\n")
        else:
            _reply(chat, text, write)


def _message(read: Callable[[str], str]) -> str:
    """Reads a line, and those that it goes on in."""
    lines = [read("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(". "))
    return "\n".join(lines)


def _obey(chat: Chat, command: str, rest: str) -> str:
    if command == "/system" and rest:
        chat.reset(rest)
        return "A new conversation, with this system message."
    if command == "/system":
        return chat.system or "There is no system message."
    if command == "/reset" and not rest:
        chat.reset()
        return "A new conversation."
    if command == "/help":
        return _HELP
    return f"There is no command {command!r}.{nearest(command, _COMMANDS)}\n{_HELP}"


def _reply(chat: Chat, text: str, write: Callable[[str], Any]) -> None:
    answer = chat.answer(text)
    try:
        with contextlib.closing(answer):
            for piece in answer:
                write(piece)
        write(f"\n{chat.note}\n" if chat.note else "\n")
    except KeyboardInterrupt:
        write(" [stopped]\n")
    except JaxftError as error:
        write("\n".join(error.problems) + "\n")


def run(chat: Chat) -> None:
    """Talks on the terminal, or answers the lines of a pipe."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  lines can then be edited and called back

        if chat.model.tokenizer.chat_template is None:
            print("The tokenizer has no chat template; the built-in default is used.")
        print(f"The context has {chat.limit} tokens.\n{_HELP}")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    talk(chat, read=input if is_terminal else lambda _: input(), write=write)

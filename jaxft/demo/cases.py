"""Generates the demo's task: complaints in plain words, answered by a clinic department."""

import random
import re
from collections.abc import Iterable
from pathlib import Path

from jaxft.demo.complaints import DEPARTMENTS, Department, speak
from jaxft.files import rewrite_jsonl

QUESTION = "Which department?"
"""Ends every case. The base model knows the form of the answer, not what belongs where."""

TRAIN_CARRIERS = (
    "{x}.",
    "Hello, {x}.",
    "Hello, {x}. That is all.",
    "For {time} now {x}.",
    "{x}, and it is worse than last week.",
    "{x}. It began {when}.",
    "It began {when}: {x}.",
    "Since {when}, {x}.",
    "I am here because {x}.",
    "My problem is that {x}.",
    "{x}. This has gone on for {time}.",
    "{x}. That is my problem.",
    "I am {age} years old and {x}.",
    "{x} every day.",
    "I need help: {x}.",
)
"""Sentences around the wordings under `train`; `{x}` is the complaint."""

HELD_OUT_CARRIERS = (
    "Doctor, {x}.",
    "Good evening, doctor. Sadly, {x}.",
    "Please tell me which door to knock on: {x}.",
    "May I ask something? {x}.",
    "Once more, {x}.",
    "{x}, I think.",
    "Can somebody look at this, please? {x}.",
    "This is why I am calling: {x}.",
)
"""Sentences around the wordings under `held_out`; none of them is used in training."""

_TIMES = ("two days", "three days", "a week", "two weeks", "a month", "some time")
_WHEN = ("yesterday", "last Monday", "last Friday", "last week", "last month")


def train_cases(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Returns `count` different (complaint, department) pairs, departments equally often."""
    return _cases(count, TRAIN_CARRIERS, held_out=False, seed=seed)


def held_out_cases(count: int, *, seed: int = 1) -> list[tuple[str, str]]:
    """Returns `count` pairs whose wordings and carriers never occur in `train_cases`."""
    return _cases(count, HELD_OUT_CARRIERS, held_out=True, seed=seed)


def ask(complaint: str) -> str:
    """Returns the complaint with the question that ends every case."""
    return f"{complaint} {QUESTION}"


def messages(complaint: str, department: str) -> list[dict[str, str]]:
    """Returns the chat that a case is trained on."""
    return [
        {"role": "user", "content": complaint},
        {"role": "assistant", "content": department},
    ]


def write_cases(path: Path, cases: Iterable[tuple[str, str]]) -> Path:
    """Writes JSON Lines with one chat under `messages` each, and returns the path."""
    rewrite_jsonl(path, ({"messages": messages(*case)} for case in cases))
    return path


def sentence(carrier: str, clause: str) -> str:
    """Returns the carrier around the clause, with capital letters where sentences begin."""
    text = carrier.replace("{x}", clause)
    return re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _cases(
    count: int, carriers: tuple[str, ...], *, held_out: bool, seed: int
) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    cases: dict[str, str] = {}
    for number in range(count):
        department = DEPARTMENTS[number % len(DEPARTMENTS)]
        text = _complaint(rng, department, carriers, held_out)
        while text in cases:
            text = _complaint(rng, department, carriers, held_out)
        cases[text] = department.name
    pairs = list(cases.items())
    rng.shuffle(pairs)
    return pairs


def _complaint(
    rng: random.Random, department: Department, carriers: tuple[str, ...], held_out: bool
) -> str:
    wordings = department.held_out if held_out else department.train
    text = sentence(rng.choice(carriers), speak(rng.choice(wordings), "I"))
    text = text.replace("{time}", rng.choice(_TIMES)).replace("{when}", rng.choice(_WHEN))
    return ask(text.replace("{age}", str(rng.randrange(18, 90))))

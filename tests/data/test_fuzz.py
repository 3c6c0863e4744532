"""Damaged rows of every format: each is trained as it reads, or refused with its file and line."""

import collections
import copy
import json
import random
import re
from dataclasses import dataclass

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxft.config import DataConfig
from jaxft.data import prepare
from jaxft.data.preparation import skipped_rows
from jaxft.errors import DataError, JaxftError
from tests.templates import BLOCK, HARMONY, NOTES, PLAIN, SPECIAL, TOOLS, byte_tokenizer
from tests.tiny_run import write_base

ROWS = 500
MARKER = re.compile("k[0-9]+v")
THINKING = ("reasoning_content", "thinking", "reasoning")
TRAINING = ("weight", "loss_weight", "loss", "train", "training", "trainable")
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
    "function_call": "assistant",
}
TEMPLATES = {
    "tools": TOOLS,
    "plain": PLAIN,
    "block": BLOCK,
    "harmony": HARMONY,
    "notes": NOTES,
    "own": "",
}
# What templates write between prompt and content, and behind it.
PARTS = (
    *SPECIAL,
    "<|endoftext|>",
    "<think>\n",
    "\n</think>\n\n",
    "</think>",
    "<think>",
    "<tool_call>",
    "assistant",
    " to=functions.",
    "analysis",
    "commentary",
    "final",
    "notes: none",
    "notes: ",
    "answer: ",
    "\n",
)


class Writer:
    """Makes rows whose every text has a word of its own."""

    def __init__(self, seed, control):
        self.random = random.Random(seed)
        self.control = control
        self.count = 0

    def text(self):
        self.count += 1
        pieces = [
            f"k{self.count}v",
            *self.random.choices(self.pieces(), k=self.random.randint(0, 3)),
        ]
        self.random.shuffle(pieces)
        return "".join(pieces)

    def pieces(self):
        return [
            *(" ", "a word ", "\n", "\n\n", "  ", "é", "\U0001f600", "\u2028", "\u200b", "\x00"),
            *("{{ 1 }}", "{% raw %}", "<think>", "</think>", "<tool_call>", "assistant", "final"),
            *("<think>so</think>", '"', "\\", "qz0n0zq", "xqzmarkzqx", *self.control),
        ]

    def messages(self):
        found = [self.message("system")] if self.random.random() < 0.3 else []
        for _ in range(self.random.randint(1, 3)):
            found.append(self.message("user"))
            if self.random.random() < 0.2:
                found.append({"role": "assistant", "content": None, "tool_calls": [self.call()]})
                found.append(self.message("tool"))
            found.append(self.message("assistant"))
            if self.random.random() < 0.3:
                found[-1][self.random.choice(THINKING)] = self.text()
            if self.random.random() < 0.2:
                found[-1][self.random.choice(TRAINING)] = self.random.choice((0, 1, True, False))
        return found

    def message(self, role):
        return {"role": role, "content": self.text()}

    def call(self):
        self.count += 1
        arguments = {f"k{self.count}v": self.text()}
        if self.random.random() < 0.5:
            arguments = json.dumps(arguments)
        function = {"name": f"k{self.count}vname", "arguments": arguments}
        return {"type": "function", "function": function}

    def row(self, row_format):
        match row_format:
            case "messages":
                row = {"messages": self.messages()}
                return (
                    row if self.random.random() < 0.9 else {"messages": json.dumps(self.messages())}
                )
            case "sharegpt":
                names = {"user": "human", "assistant": "gpt", "tool": "observation"}
                return {
                    "conversations": [
                        {"from": names.get(m["role"], m["role"]), "value": m["content"]}
                        for m in self.messages()
                        if m["role"] != "tool" and m["content"]
                    ]
                }
            case "alpaca":
                return {"instruction": self.text(), "input": self.text(), "output": self.text()}
            case "prompt_completion":
                if self.random.random() < 0.5:
                    return {"prompt": self.text(), "completion": self.text()}
                messages = self.messages()
                return {"prompt": messages[:-1], "completion": messages[-1:]}
            case "columns":
                return {"q": self.text(), "a": self.text(), "s": self.text()}
        return {"text": self.text()}

    def damaged(self, row_format):
        """A row in which up to two things are changed, as JSON text."""
        row = self.row(row_format)
        for _ in range(self.random.randint(0, 2)):
            self.damage(row)
        text = json.dumps(row, ensure_ascii=self.random.random() < 0.5)
        if self.random.random() < 0.05:
            return text.replace("{", '{"role": "user", "role": "assistant", ', 1)
        return text.replace('"@deep"', "[" * 2000 + "]" * 2000).replace('"@digits"', "7" * 5000)

    def damage(self, row):
        places = list(_places(row))
        if not places:
            return
        parent, key = self.random.choice(places)
        kind = self.random.choice(
            ("value", "value", "text", "drop", "rename", "add", "twice", "role")
        )
        if kind == "value":
            parent[key] = self.value()
        elif kind == "text" and isinstance(parent[key], str):
            parent[key] = self.text()
        elif kind == "drop":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            name = self.random.choice(("Role", "content", "from", "k0", key + " "))
            parent[name] = parent.pop(key)
        elif kind == "add" and isinstance(parent, dict):
            parent[self.random.choice(self.keys())] = self.value()
        elif kind == "twice" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == "role":
            for holder, name in places:
                if name in ("role", "from") and self.random.random() < 0.4:
                    holder[name] = self.random.choice((*ROLES, "User", "", "k"))

    def value(self):
        return self.random.choice(
            (
                *(None, True, False, 0, 1, -1, 0.5, float("nan"), float("inf"), 10**30, "", " "),
                *([], {}, [[]], [{}], [None], {"a": {}}, "user", "\ud83d", "\ude00a", "@deep"),
                *("@digits", "{}", "[]", "null", "{zone: 1}", self.text(), [self.text()]),
                [{"type": "text", "text": self.text()}, {"type": "text", "text": self.text()}],
                [{"type": "image", "text": self.text()}],
                [self.call()],
                self.call()["function"],
                {"name": self.text(), "arguments": self.text()},
                json.dumps({"name": "f", "arguments": {"a": self.text()}}),
                [{"type": "function", "function": {"name": "k0vtool", "parameters": {}}}],
            )
        )

    def keys(self):
        return [
            *TRAINING,
            *THINKING,
            *("mask", "ignore", "images", "label", "chosen", "history", "system", "tools"),
            *("functions", "function_call", "tool_calls", "name", "tool_call_id", "content"),
            *("context", "response", "role", "from", "value", "text", "k0vkey"),
        ]


def _places(value):
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@dataclass
class Turn:
    role: str
    content: str
    thinking: str
    calls: list
    trained: bool


def read_turns(row, row_format):
    """What a row says, read as plainly as can be: it was accepted, so it is sound."""
    found = []
    match row_format:
        case "messages":
            found = row["messages"]
        case "sharegpt":
            found = row["conversations"]
        case "alpaca":
            for asked, answer in row.get("history") or ():
                found += [_said("user", asked), _said("assistant", answer)]
            more = [row[k] for k in ("input", "context") if _is_given(row.get(k))][:1]
            asked = "\n\n".join(map(_as_text, [row["instruction"], *more]))
            answer = row["output"] if "output" in row else row["response"]
            found += [_said("user", asked), _said("assistant", answer)]
        case "prompt_completion":
            answer = row["completion"] if "completion" in row else row["response"]
            if isinstance(row["prompt"], list):
                found = row["prompt"] + answer
            else:
                found = [_said("user", row["prompt"]), _said("assistant", answer)]
        case "columns":
            row = {**row, "system": row.get("s")}
            found = [_said("user", row["q"]), _said("assistant", row["a"])]
    found = json.loads(found) if isinstance(found, str) else found
    if _is_given(row.get("system")):
        found = [_said("system", row["system"]), *found]
    return [_turn(message, row_format) for message in found]


def _is_given(value):
    return value not in (None, "") and value == value


def _said(role, content):
    return {"role": role, "content": _as_text(content)}


def _as_text(cell):
    return cell if isinstance(cell, str) else json.dumps(cell)


def _turn(message, row_format):
    is_sharegpt = row_format == "sharegpt" and "from" in message
    name = message["from" if is_sharegpt else "role"]
    content = message["value"] if is_sharegpt else message.get("content")
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [message["function_call"]]
    if name == "function_call":
        content, calls = "", [json.loads(content) if isinstance(content, str) else content]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return Turn(
        ROLES[name],
        content or "",
        next((message[key] for key in THINKING if message.get(key)), ""),
        [call.get("function", call) for call in calls],
        all(message.get(key) is None or bool(message[key]) for key in TRAINING),
    )


def said(turn):
    """What an answer must be seen to say: its content without reasoning, or its calls."""
    calls = "".join(call["name"] + json.dumps(call.get("arguments")) for call in turn.calls)
    return (turn.content.rpartition("</think>")[2] if not turn.calls else calls).strip()


def shown(turn):
    """A text by which the run of an answer is known among others."""
    if turn.calls:
        return turn.calls[0]["name"]
    return said(turn) or turn.thinking.strip() or turn.content.strip()


def markers(text):
    return MARKER.findall(text)


class Result:
    """What became of the rows of one file: documents by line, problems by line."""

    def __init__(self, rows, tokenizer):
        self.documents = collections.defaultdict(list)
        documents = rows.documents
        for record in documents.index:
            part = slice(int(record["start"]), int(record["start"] + record["length"]))
            ids, trained = documents.tokens[part], documents.trained[part].astype(bool)
            self.documents[int(record["line"])].append((ids, trained))
        self.problems = {}
        for skipped in skipped_rows(rows):
            origin, line = skipped["origin"].rsplit(":", 1)
            assert origin.endswith("rows.jsonl")
            self.problems[int(line)] = skipped["problem"]
        self.tokenizer = tokenizer

    def text(self, line):
        return "".join(self.tokenizer.decode(ids) for ids, _ in self.documents[line])

    def runs(self, line):
        """Trained runs, each with the token behind it."""
        for ids, trained in self.documents[line]:
            cuts = np.flatnonzero(np.diff(np.r_[False, trained, False])).reshape(-1, 2)
            for begin, end in cuts:
                behind = self.tokenizer.decode(ids[end : end + 1])
                yield self.tokenizer.decode(ids[begin:end]), behind

    def control(self, line, special):
        return [int(i) for ids, _ in self.documents[line] for i in ids if int(i) in special]


def read(folder, lines, tokenizer, row_format, template, **options):
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(line.encode("utf-8", "surrogatepass") + b"\n" for line in lines))
    columns = "prompt=q,completion=a,system=s" if row_format == "columns" else ""
    config = DataConfig(
        format=row_format,
        columns=columns,
        template=template,
        cache=str(folder / "cache"),
        max_length=1 << 16,
        bad_share=1.0,
        **options,
    )
    rows = prepare(str(path), config, tokenizer, seed=0, training=False, on_log=lambda _: None)
    return Result(rows, tokenizer)


def check(result, line, row, row_format, thinking, exact):
    """Compares what is trained of an accepted row with what the row says."""
    text, runs = result.text(line), list(result.runs(line))
    if row_format == "text":
        [(run, _)] = runs
        assert run == text
        assert markers(str(row["text"])) == markers(text)
        return
    turns = read_turns(row, row_format)
    answers = [turn for turn in turns if turn.role == "assistant" and turn.trained]
    assert len(runs) == len(answers)
    if thinking == "keep" and answers:
        # Each conversation ends with a trained answer, and not all answers are in the first one.
        turns = turns[: max(i for i, turn in enumerate(turns) if turn is answers[-1]) + 1]
        runs.sort(key=lambda run: next(i for i, a in enumerate(answers) if shown(a) in run[0]))
    for turn in turns:
        assert set(markers(said(turn))) <= set(markers(text)), turn
    for (run, behind), turn in zip(runs, answers, strict=True):
        rest = run
        assert rest.endswith(("|>", "<end>", "</s>")) or behind in ("<|end|>",), (run, behind)
        allowed = collections.Counter(
            markers(json.dumps([turn.content, turn.thinking, turn.calls]))
        )
        found = collections.Counter(markers(run))
        assert not set(found) - set(allowed), (run, turn)
        assert set(markers(said(turn))) <= set(found)
        if turn.thinking and thinking == "keep":
            assert set(markers(turn.thinking)) <= set(found)
        if turn.thinking and thinking == "drop":
            assert not set(markers(turn.thinking)) & set(found)
        if exact and not turn.calls and "</think>" not in turn.content:
            check_exactly(run, turn)


def check_exactly(run, turn):
    """The content is there letter for letter, and beside it only reasoning and the template."""
    content = turn.content.strip()
    before, found, after = run.rpartition(content) if content else (run, "", "")
    assert found == content
    rest = before.replace(turn.thinking.strip(), "") + after
    for part in PARTS:
        rest = rest.replace(part, "")
    assert not rest.strip(), (run, rest)


CASES = [
    (row_format, template, thinking)
    for row_format in ("messages", "sharegpt", "alpaca", "prompt_completion", "columns", "text")
    for template, thinking in (
        ("tools", "template"),
        ("plain", "template"),
        ("block", "keep"),
        ("harmony", "keep"),
        ("harmony", "template"),
        ("notes", "drop"),
        ("own", "template"),
    )
]
GOOD = {
    "messages": {"messages": [_said("user", "q"), _said("assistant", "a")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "columns": {"q": "q", "a": "a", "s": None},
    "text": {"text": "t"},
}


@pytest.mark.parametrize(("row_format", "template", "thinking"), CASES)
def test_damaged_rows_are_trained_as_they_read_or_refused(tmp_path, row_format, template, thinking):
    if template == "own":
        tokenizer = AutoTokenizer.from_pretrained(write_base(tmp_path / "base"))
        path = ""
    else:
        tokenizer = byte_tokenizer()
        path = str(tmp_path / "template.jinja")
        (tmp_path / "template.jinja").write_text(TEMPLATES[template])
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    writer = Writer(f"{row_format} {template} {thinking}", tokenizer.all_special_tokens)
    count = ROWS // len(CASES) + 1 if row_format != "messages" else 5 * ROWS // len(CASES)
    lines = [writer.damaged(row_format) for _ in range(count)]
    lines = [json.dumps(GOOD[row_format]), *lines]
    options = {"thinking": thinking}
    result = read(tmp_path, lines, tokenizer, row_format, path, bad_rows="skip", **options)
    assert 1 not in result.problems
    harmless = [_harmless(line, tokenizer.all_special_tokens) for line in lines]
    other = read(tmp_path, harmless, tokenizer, row_format, path, bad_rows="skip", **options)
    for number, line in enumerate(lines, 1):
        assert bool(result.documents[number]) != (number in result.problems), line
        if number in result.problems:
            assert not re.search(r"Traceback|Error:", result.problems[number])
            assert "recursion" not in result.problems[number]
            continue
        row = json.loads(line)
        check(result, number, row, row_format, thinking, exact=template != "own")
        assert result.control(number, special) == other.control(number, special), line


def test_each_damaged_row_is_refused_alone_as_it_is_left_out_among_others(tmp_path):
    tokenizer = byte_tokenizer()
    path = tmp_path / "template.jinja"
    path.write_text(TOOLS)
    writer = Writer("alone", SPECIAL)
    lines = [json.dumps(GOOD["messages"]), *(writer.damaged("messages") for _ in range(60))]
    together = read(tmp_path, lines, tokenizer, "messages", str(path), bad_rows="skip")
    assert len(together.problems) > 10
    for number, line in enumerate(lines, 1):
        try:
            alone = read(tmp_path, ["", line], tokenizer, "messages", str(path))
        except JaxftError as error:
            if number in together.problems:
                assert f"rows.jsonl:2: {together.problems[number]}" in str(error)
            else:
                [(_, trained)] = together.documents[number]
                assert not trained.any()
                assert "no token of the conversations would be trained" in str(error)
        else:
            [(ids, trained)] = alone.documents[2]
            [(other_ids, other_trained)] = together.documents[number]
            assert ids.tolist() == other_ids.tolist()
            assert trained.tolist() == other_trained.tolist()


def test_a_template_without_an_end_is_refused_though_bad_rows_are_left_out(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    lines = [json.dumps(GOOD["messages"])] * 3
    with pytest.raises(DataError, match="puts no special token after an answer"):
        read(tmp_path, lines, byte_tokenizer(), "messages", str(path), bad_rows="skip")


def _harmless(line, control):
    for token in control:
        line = line.replace(token, "x" * 3)
    return line

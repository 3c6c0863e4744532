"""Text from models by name, as the openai client sees it."""

import json
import shutil
import threading
import time

import numpy as np
import openai
import pytest

import jaxft
from jaxft.service.tool_calls import find_calls, ready_text
from tests.programs.test_side_by_side import write
from tests.service.serving import client_of, front, near
from tests.tiny_run import write_base

SAY = [{"role": "user", "content": "say abc"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models: a base and two adapters of it, and one that shares no model."""
    folder = tmp_path_factory.mktemp("m")
    write_base(folder / "base")
    write(folder, "one", {"layers.attn.q": 3, "layers.mlp.down": 3})
    write(folder, "two", {"layers.attn.q": 4, "layers.mlp.down": 4})
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def served(home):
    with near(home, rows=4) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return served[0]


@pytest.fixture(scope="module")
def base(home):
    return jaxft.load(home / "base")


def text_of(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_conversation_is_answered_as_by_the_model_alone(client, base):
    found = client.chat.completions.create(
        model="base", messages=SAY, temperature=0, max_tokens=9, user="me", metadata={"a": "b"}
    )
    [choice] = found.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == base.generate(SAY, max_new_tokens=9)
    assert choice.finish_reason == "length" and found.model == "base"
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(base.prompt_ids(SAY)),
        "completion_tokens": 9,
        "total_tokens": len(base.prompt_ids(SAY)) + 9,
    }


def test_a_stream_gives_the_same_and_the_same_again_by_its_seed(client):
    ask = {"model": "base", "messages": SAY, "temperature": 1.2, "seed": 5, "max_tokens": 20}
    whole = client.chat.completions.create(**ask, n=3)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3 and whole.usage.completion_tokens <= 60
    chunks = list(
        client.chat.completions.create(
            **ask, n=3, stream=True, stream_options={"include_usage": True}
        )
    )
    streamed = ["", "", ""]
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        assert chunk.usage is None and chunk.id == chunks[0].id
    assert streamed == texts
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    ended = [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason]
    assert sorted(ended) == sorted(choice.finish_reason for choice in whole.choices)
    other = client.chat.completions.create(**{**ask, "seed": 6}, n=3)
    assert [choice.message.content for choice in other.choices] != texts


def test_texts_are_continued_and_nothing_of_a_stop_string_is_sent(client, base):
    ask = {"model": "base", "prompt": ["abc", base.prompt_ids("say 1")][0], "temperature": 0}
    [choice] = client.completions.create(**ask, max_tokens=12, echo=True).choices
    text = choice.text
    assert text == "abc" + base.generate("abc", max_new_tokens=12)
    stop = text[8:11]
    [choice] = client.completions.create(**ask, max_tokens=12, stop=stop).choices
    assert choice.text == text[3 : text.index(stop, 3)] and choice.finish_reason == "stop"
    chunks = list(client.completions.create(**ask, max_tokens=12, stop=[stop, "zzz"], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == "stop"
    several = client.completions.create(
        model="base", prompt=[base.prompt_ids("abc"), base.prompt_ids("say 1")], temperature=0
    )
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text.startswith(text[3:])
    assert several.usage.completion_tokens == 32  # 16 each, where nothing else is asked for


@pytest.mark.slow(seconds=2)
def test_log_probabilities_are_those_of_a_forward_pass(client, base):
    found = client.chat.completions.create(
        model="base", messages=SAY, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = found.choices[0].logprobs.content
    prompt = base.prompt_ids(SAY)
    [new] = base.complete([prompt], max_new_tokens=6)
    logits = np.asarray(base([[*prompt, *new]]))[0, len(prompt) - 1 : -1].astype(np.float64)
    logs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    assert [item.token for item in content] == base.tokenizer.convert_ids_to_tokens(new)
    np.testing.assert_allclose(
        [item.logprob for item in content], logs[range(len(new)), new], atol=1e-5
    )
    for item in content:
        assert len(item.top_logprobs) == 3 and item.top_logprobs[0].token == item.token
        assert bytes(item.bytes).decode() == item.token
    pieces = client.chat.completions.create(
        model="base", messages=SAY, temperature=0, max_tokens=6, logprobs=True, stream=True
    )
    given = [c.choices[0].logprobs.content for c in pieces if c.choices[0].logprobs]
    assert [item.logprob for part in given for item in part] == [i.logprob for i in content]
    of_text = client.completions.create(
        model="base", prompt=prompt, temperature=0, max_tokens=6, logprobs=2
    )
    choice = of_text.choices[0]
    assert choice.logprobs.token_logprobs == [item.logprob for item in content]
    assert all(len(likely) == 2 for likely in choice.logprobs.top_logprobs)
    for token, place in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[place:].startswith(token)
    # Of a prompt too, which is how answers are compared that others wrote.
    ask = {"model": "base", "prompt": [*prompt, *new], "echo": True, "logprobs": 2}
    [only] = client.completions.create(**ask, max_tokens=0).choices
    assert only.logprobs.token_logprobs[0] is None and only.logprobs.top_logprobs[0] is None
    assert only.logprobs.token_logprobs[len(prompt) :] == pytest.approx(
        choice.logprobs.token_logprobs, abs=1e-5
    )
    assert len(only.logprobs.tokens) == len(prompt) + len(new)
    assert only.text.endswith(choice.text) and only.finish_reason == "length"
    one = client.completions.create(**{**ask, "prompt": [5]}, max_tokens=0).choices[0]
    assert one.logprobs.token_logprobs == [None] and len(one.logprobs.tokens) == 1
    chunks = list(client.completions.create(**ask, max_tokens=2, stream=True))
    given = [p for c in chunks if (x := c.choices[0].logprobs) for p in x.token_logprobs]
    assert (
        given[:-2] == only.logprobs.token_logprobs and len(given) == len(only.logprobs.tokens) + 2
    )


@pytest.mark.slow(seconds=3)
def test_adapters_of_one_model_answer_in_one_batch_as_they_do_alone(client, served):
    ask = {"messages": SAY, "temperature": 0, "max_tokens": 10}
    names = ("base", "one", "two")
    streams = [client.chat.completions.create(model=n, stream=True, **ask) for n in names]
    together = [text_of(stream) for stream in streams]
    alone = [client.chat.completions.create(model=name, **ask) for name in names]
    assert together == [found.choices[0].message.content for found in alone]
    assert len(set(together)) == 3
    loaded = served[1].models._loaded.values()
    assert len(loaded) == 3 and len({id(one.base) for one in loaded}) == 1


REFUSED = {
    "temprature": 1,
    "frequency_penalty": 0.5,
    "response_format": {"type": "json_object"},
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "n": 0,
    "temperature": "hot",
    "service_tier": "flex",
    "top_logprobs": 2,
    "max_tokens": 0,
    "stream_options": {"include_usage": True},
    "stop": [""],
    "logit_bias": {"5": 100},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_understood_is_refused_by_name(client, field):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="base", messages=SAY, extra_body={field: REFUSED[field]}
        )
    assert caught.value.param.split(".")[0] == field
    assert field in str(caught.value)


def test_other_wrong_requests_have_errors_of_their_own(client):
    def chat(**changes):
        return client.chat.completions.create(**{"model": "base", "messages": SAY, **changes})

    picture = {"type": "image_url", "image_url": {"url": "http://a/b.png"}}
    with pytest.raises(openai.BadRequestError, match="text only: no pictures") as caught:
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, picture]}])
    assert caught.value.param == "messages.0.content.1"
    with pytest.raises(openai.BadRequestError, match=r"context has .* tokens") as caught:
        chat(messages=[{"role": "user", "content": "a" * 5000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="new ones"):
        chat(max_tokens=10**6)
    with pytest.raises(openai.NotFoundError) as caught:
        chat(model="none")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="model_type"):
        chat(model="broken")
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        chat(tools=[{"type": "function", "function": {"name": "look_up"}}])
    with pytest.raises(openai.BadRequestError, match="best_of is 3"):
        client.completions.create(model="base", prompt="a", best_of=3)
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="base", prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match="at least one character"):
        client.completions.create(model="base", prompt=["a", ""])
    assert chat(max_tokens=1).choices  # and it goes on


def engine_of(client, desk):
    """Returns the engine of the base."""
    client.completions.create(model="base", prompt="a", max_tokens=1)
    [engine] = {one.base.engine for one in desk.models._loaded.values()}
    return engine


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow(seconds=2)
def test_a_client_that_goes_frees_its_row(served, monkeypatch):
    client, desk = served
    engine = engine_of(client, desk)
    slow, real = threading.Event(), type(engine).step

    def step(self, most, **parts):
        slow.wait(0.05)
        return real(self, 1, **parts)

    monkeypatch.setattr(type(engine), "step", step)
    long = {"model": "base", "prompt": "abc", "max_tokens": 100, "temperature": 0}
    stream = client.completions.create(**long, n=6, stream=True)
    next(iter(stream))
    assert desk.texts == 6 and not engine.idle
    stream.close()
    until(lambda: desk.texts == 0 and engine.idle)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**long)
    until(lambda: desk.texts == 0 and engine.idle)
    slow.set()


def test_more_texts_than_there_is_room_for_are_refused(served, monkeypatch):
    client, desk = served
    monkeypatch.setattr(desk, "texts", 255)
    with pytest.raises(openai.RateLimitError, match="ask again"):
        client.completions.create(model="base", prompt="a", n=2)
    monkeypatch.undo()


def test_what_goes_wrong_under_way_reaches_the_client(served, monkeypatch):
    client, desk = served
    engine = engine_of(client, desk)
    ask = {"model": "base", "prompt": "abc", "max_tokens": 60, "temperature": 0}

    def fail(self, most, **_):
        raise RuntimeError("the device is gone")

    stream = iter(client.completions.create(**ask, stream=True))
    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "step", fail)
        with pytest.raises(openai.APIError, match="device is gone"):
            list(stream)
            list(client.completions.create(**ask, stream=True))
        with pytest.raises(openai.InternalServerError, match="device is gone"):
            client.completions.create(**ask)
    assert client.completions.create(**ask).choices[0].text


@pytest.mark.slow(seconds=2)
def test_models_make_room_for_others(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "a")
    shutil.copytree(home / "base", tmp_path / "b")
    with near(tmp_path, most=1, rows=4) as (client, desk):
        for name in "ab":
            assert client.completions.create(model=name, prompt="a", max_tokens=1).choices
            assert desk.models.names() == [str(tmp_path / name)]


def test_calls_of_tools_are_told_from_text():
    names = {"look_up", "add"}
    call = '<tool_call>\n{"name": "look_up", "arguments": {"word": "é"}}\n</tool_call>'
    content, calls = find_calls(f"Let me see.\n{call}\n{call}", names)
    assert content == "Let me see." and len(calls) == 2
    assert json.loads(calls[0]["function"]["arguments"]) == {"word": "é"}
    assert calls[0]["id"] != calls[1]["id"]
    for text in ('{"name": "add", "parameters": {}}', '[{"name": "add", "arguments": {}}]'):
        [found] = find_calls(text, names).calls
        assert found["function"] == {"name": "add", "arguments": "{}"}
    for text in ("plain", '{"name": "other", "arguments": {}}', "<tool_call>no</tool_call>", "{"):
        assert find_calls(text, names) == (text, [])
    whole = f"Let me see.\n{call}"
    for end in range(len(whole)):
        assert ready_text(whole[:end]) <= len("Let me see.")
    assert ready_text("a < b") == len("a < b")


class Fixed:
    """A generator that says what it is told to say."""

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    async def generate(self, asked):
        self.asked.append(asked)
        yield {"prompt_tokens": [7]}
        for number, text in enumerate(self.texts, start=1):
            yield {"index": 0, "text": text, "tokens": number}
        yield {"index": 0, "text": "", "tokens": len(self.texts), "ended": "stop"}


def test_calls_of_tools_reach_the_client_at_once_and_as_a_stream(home):
    call = '<tool_call>{"name": "look_up", "arguments": {"word": "a<b"}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    generator = Fixed(["I see", ". <", call[1:12], call[12:], "\n", call])
    with client_of(front(home, generator)) as client:
        ask = {"model": "base", "messages": SAY, "tools": tools}
        [choice] = client.chat.completions.create(**ask).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content == "I see."
        assert [c.function.name for c in choice.message.tool_calls] == ["look_up"] * 2
        assert choice.message.tool_calls[0].function.arguments == '{"word": "a<b"}'
        deltas = [c.choices[0] for c in client.chat.completions.create(**ask, stream=True)]
        assert "".join(d.delta.content or "" for d in deltas) == "I see."
        [calls] = [d.delta.tool_calls for d in deltas if d.delta.tool_calls]
        assert [c.index for c in calls] == [0, 1] and calls[1].function.name == "look_up"
        assert deltas[-1].finish_reason == "tool_calls"
        # What was called goes back with its results, and the template sees both.
        answer = choice.message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "x"}
        generator.texts = ["no <tool_call> at all"]
        chunks = client.chat.completions.create(
            **{**ask, "messages": [*SAY, answer, result]}, stream=True
        )
        assert text_of(chunks) == "no <tool_call> at all"
        sent = generator.asked[-1].prompts[0]
        assert sent.messages[1]["tool_calls"][0]["function"]["name"] == "look_up"
        assert sent.messages[2] == result and sent.tools == tools
        client.chat.completions.create(**ask, tool_choice="none")
        assert generator.asked[-1].prompts[0].tools is None


@pytest.mark.slow(seconds=4)
def test_a_real_model_tells_its_story(shared, tmp_path):
    (tmp_path / "stories").symlink_to(shared / "models/stories260K")
    golden = (shared / "models/stories260K/golden/greedy_200_runc.txt").read_text()
    with near(tmp_path, rows=2) as (client, _):
        ask = {"model": "stories", "prompt": "Once upon a time", "temperature": 0}
        found = client.completions.create(**ask, max_tokens=120, echo=True).choices[0].text
        assert len(found) > 300 and golden.startswith(found)
        chunks = client.completions.create(
            **ask, max_tokens=120, stop=["mom", "mommy"], stream=True
        )
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert text == golden[len("Once upon a time") : golden.index("mom")]

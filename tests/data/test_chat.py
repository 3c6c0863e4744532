"""Messages to ids: against Hugging Face's own rendering, and by the definition of the mask."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxft.config import DataConfig
from jaxft.data.chat import chat_examples, prompt_ids, text_examples
from jaxft.data.control_tokens import ControlTokens
from jaxft.data.formats import Conversation
from jaxft.data.problems import RowError
from jaxft.data.template import DATE, Template, check_can_stop, render, resolve_template
from jaxft.errors import ConfigError, DataError

FOLDERS = {
    "qwen3": "tokenizers/qwen3-hf",
    "deepseek": "tokenizers/deepseek-r1",
    "stories": "models/stories260K",
    "gpt2": "tokenizers/gpt2",
    "bert": "tokenizers/bert-base-uncased",
}


@pytest.fixture(scope="session")
def load(shared):
    loaded = {}

    def load_tokenizer(name):
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(shared / FOLDERS[name])
        return loaded[name]

    return load_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def examples(tokenizer, messages, *, train_on="assistant", thinking="template", tools=None, **data):
    template = resolve_template(tokenizer, DataConfig(**data))
    conversation = Conversation(messages, tools, "rows.jsonl:1")
    [result] = chat_examples(
        tokenizer, [conversation], template=template, train_on=train_on, thinking=thinking
    )
    if isinstance(result, RowError):
        raise result
    return result


def trained_texts(tokenizer, example):
    """The maximal runs of trained tokens, as text."""
    cuts = np.flatnonzero(np.diff(np.r_[False, example.trained, False]))
    return [tokenizer.decode(example.ids[a:b]) for a, b in cuts.reshape(-1, 2)]


TWO_TURNS = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]
TWO_THOUGHTS = [
    user("q1"),
    assistant("<think>\nr1\n</think>\n\na1"),
    user("q2"),
    assistant("<think>\nr2\n</think>\n\na2"),
]


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
@pytest.mark.parametrize("messages", [TWO_TURNS, TWO_THOUGHTS])
def test_ids_are_those_of_hugging_face(load, name, messages):
    tokenizer = load(name)
    [example] = examples(tokenizer, messages)
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert example.ids.tolist() == expected


@pytest.mark.parametrize("name", ["qwen3", "deepseek", "stories", "gpt2"])
@pytest.mark.parametrize("thinking", ["template", "keep", "drop"])
@pytest.mark.parametrize("messages", [TWO_TURNS, TWO_THOUGHTS])
def test_trained_tokens_follow_the_prompt_of_generation(load, name, thinking, messages):
    tokenizer = load(name)
    template = resolve_template(tokenizer, DataConfig())
    for example in examples(tokenizer, messages, thinking=thinking):
        last = 3 if b"q2" in tokenizer.decode(example.ids).encode() else 1
        prompt = prompt_ids(tokenizer, messages[:last], template=template, thinking=thinking)
        assert example.ids[: len(prompt)].tolist() == prompt
        assert not example.trained[len(prompt) - 1]
        assert example.trained[len(prompt)]


@pytest.mark.parametrize("name", ["qwen3", "deepseek", "stories", "gpt2"])
def test_every_answer_ends_with_a_trained_stop_token(load, name):
    tokenizer = load(name)
    [example] = examples(tokenizer, TWO_TURNS)
    runs = trained_texts(tokenizer, example)
    assert len(runs) == 2
    for run, answer in zip(runs, ("a1", "a2"), strict=True):
        assert run.endswith(answer + tokenizer.eos_token)


def test_qwen3_drops_earlier_thoughts_and_says_so(load):
    tokenizer = load("qwen3")
    [example] = examples(tokenizer, TWO_THOUGHTS)
    assert trained_texts(tokenizer, example) == [
        "a1<|im_end|>",
        "<think>\nr2\n</think>\n\na2<|im_end|>",
    ]
    assert (example.thinking_blocks, example.lost_blocks, example.rewritten_turns) == (2, 1, 1)


def test_keeping_thoughts_trains_each_turn_as_qwen3_generates_it(load):
    tokenizer = load("qwen3")
    first, second = examples(tokenizer, TWO_THOUGHTS, thinking="keep")
    assert trained_texts(tokenizer, first) == ["<think>\nr1\n</think>\n\na1<|im_end|>"]
    assert trained_texts(tokenizer, second) == ["<think>\nr2\n</think>\n\na2<|im_end|>"]
    expected = tokenizer.apply_chat_template(TWO_THOUGHTS[:2], tokenize=True, return_dict=False)
    assert first.ids.tolist() == expected
    assert first.lost_blocks == second.lost_blocks == 0


def test_deepseek_strips_every_thought_and_keeping_restores_them(load):
    tokenizer = load("deepseek")
    [example] = examples(tokenizer, TWO_THOUGHTS)
    assert (example.thinking_blocks, example.lost_blocks) == (2, 2)
    kept = examples(tokenizer, TWO_THOUGHTS, thinking="keep")
    end = tokenizer.eos_token
    assert [trained_texts(tokenizer, item) for item in kept] == [
        ["<think>\nr1\n</think>\n\na1" + end],
        ["<think>\nr2\n</think>\n\na2" + end],
    ]


def test_a_template_that_opens_thinking_needs_kept_thoughts(load, tmp_path):
    tokenizer = load("deepseek")
    before, condition, after = tokenizer.chat_template.rpartition("{% if add_generation_prompt")
    assert condition
    opening = before + condition + after.replace("'}}", "<think>\\n'}}")
    path = tmp_path / "template.jinja"
    path.write_text(opening, "utf-8")
    with pytest.raises(RowError, match=r"opens a <think> block .*data\.thinking=keep"):
        examples(tokenizer, TWO_THOUGHTS, template=str(path))
    for item in examples(tokenizer, TWO_THOUGHTS, thinking="keep", template=str(path)):
        [run] = trained_texts(tokenizer, item)
        assert run.startswith("r")  # <think> belongs to the prompt that generation begins with
        assert "</think>" in run


def test_dropping_thoughts_equals_never_having_had_them(load):
    for name in ("qwen3", "deepseek", "gpt2"):
        tokenizer = load(name)
        with_key = [user("q1"), assistant("a1", reasoning_content="r1"), *TWO_THOUGHTS[2:]]
        [plain] = examples(tokenizer, TWO_TURNS)
        for messages in (TWO_THOUGHTS, with_key):
            [dropped] = examples(tokenizer, messages, thinking="drop")
            np.testing.assert_array_equal(dropped.ids, plain.ids)
            np.testing.assert_array_equal(dropped.trained, plain.trained)


CALL = {"type": "function", "function": {"name": "time", "arguments": '{"zone":  "UTC"}'}}
WITH_TOOL = [
    user("What time is it?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "12:00"},
    assistant("Noon."),
]


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_tool_calls_are_trained_with_their_raw_arguments_and_results_are_not(load, name):
    tokenizer = load(name)
    tools = [{"type": "function", "function": {"name": "time", "parameters": {}}}]
    [example] = examples(tokenizer, WITH_TOOL, tools=tools)
    call, answer = trained_texts(tokenizer, example)
    assert '{"zone":  "UTC"}' in call
    assert "12:00" not in call + answer
    assert "Noon." in answer


def test_arguments_are_given_as_an_object_to_templates_that_write_the_json(load, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role + ':\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}"
        "{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    [example] = examples(load("qwen3"), WITH_TOOL, template=str(path))
    assert '{"zone": "UTC"}' in load("qwen3").decode(example.ids)


def test_a_weight_of_zero_masks_a_turn(load):
    tokenizer = load("qwen3")
    messages = [user("q1"), assistant("a1", weight=0), user("q2"), assistant("a2", weight=1)]
    [example] = examples(tokenizer, messages)
    [run] = trained_texts(tokenizer, example)
    assert "a2" in run
    [example] = examples(tokenizer, messages, train_on="all")
    assert "a1" not in "".join(trained_texts(tokenizer, example))
    assert "q2" in "".join(trained_texts(tokenizer, example))


def test_what_is_trained_on_is_chosen(load):
    tokenizer = load("deepseek")
    [last] = examples(tokenizer, TWO_TURNS, train_on="completion")
    assert trained_texts(tokenizer, last) == ["a2" + tokenizer.eos_token]
    [every] = examples(tokenizer, TWO_TURNS, train_on="all")
    assert every.trained.all()


@pytest.mark.parametrize("name", ["qwen3", "deepseek", "stories", "gpt2"])
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.text(
            st.characters(codec="utf-8", exclude_characters="<\uff5c"), min_size=1, max_size=12
        ).filter(str.strip),
        min_size=2,
        max_size=6,
    ).filter(lambda texts: len(texts) % 2 == 0)
)
def test_the_mask_is_the_difference_of_prefixes(load, name, texts):
    tokenizer = load(name)
    template = resolve_template(tokenizer, DataConfig())
    messages = [assistant(text) if i % 2 else user(text) for i, text in enumerate(texts)]
    [result] = chat_examples(
        tokenizer,
        [Conversation(messages, None, "x:1")],
        template=template,
        train_on="assistant",
        thinking="template",
    )
    full = render(tokenizer, messages, template=template)
    ids = tokenizer(full, add_special_tokens=False).input_ids
    expected, possible = np.zeros(len(ids), bool), True
    for turn in range(1, len(messages), 2):
        prompt = prompt_ids(tokenizer, messages[:turn], template=template)
        possible &= ids[: len(prompt)] == prompt
        stop = next(i for i in range(len(prompt), len(ids)) if ids[i] in template.stops.values())
        expected[len(prompt) : stop + 1] = True
    if not possible:
        assert isinstance(result, RowError)
        return
    assert result[0].ids.tolist() == ids
    np.testing.assert_array_equal(result[0].trained, expected)


def test_an_answer_that_merges_with_the_prompt_is_refused(load):
    with pytest.raises(RowError, match="merges across the boundary"):
        examples(load("qwen3"), [user("q"), assistant("\n\nan answer"), user("q"), assistant("a")])


@pytest.mark.parametrize("name", ["qwen3", "deepseek", "stories", "gpt2"])
def test_control_tokens_of_a_text_are_encoded_as_plain_text(load, name):
    tokenizer = load(name)
    stop = tokenizer.eos_token
    [plain] = examples(tokenizer, [user("q"), assistant("ab")])
    [forged] = examples(tokenizer, [user("q"), assistant(f"a{stop}b")])
    ends = [int((e.ids == tokenizer.eos_token_id).sum()) for e in (plain, forged)]
    assert ends[0] == ends[1]
    [run] = trained_texts(tokenizer, forged)
    assert run.count(stop) == 2
    assert forged.control_tokens == {stop: 1}


def test_role_tokens_that_are_not_special_are_control_tokens_too(load):
    tokenizer = load("deepseek")
    role = "<\uff5cUser\uff5c>"
    [example] = examples(tokenizer, [user(f"a{role}b"), assistant(f"c{role}d")])
    assert int((example.ids == tokenizer.convert_tokens_to_ids(role)).sum()) == 1
    assert example.control_tokens == {role: 2}
    assert "<tool_call>" not in ControlTokens(load("qwen3"), load("qwen3").chat_template).ids


@pytest.mark.parametrize("name", ["qwen3", "deepseek", "stories", "gpt2", "bert"])
def test_every_control_token_can_be_encoded_as_plain_text(load, name):
    tokenizer = load(name)
    control = ControlTokens(tokenizer)
    for token in list(control.ids)[:40]:
        [ids] = control.encode([control.escape(f"a {token} b")])
        assert not set(ids) & set(control.counted_ids)
        expected = tokenizer.decode(tokenizer.encode("a x b", add_special_tokens=False))
        shown = tokenizer.decode(ids).replace(" ", "").lower()
        if tokenizer.unk_token_id in (None, *control.counted_ids):
            assert shown == expected.replace(" ", "").replace("x", token).replace(" ", "").lower()


def test_a_turn_of_which_the_template_leaves_nothing_is_refused(load):
    with pytest.raises(RowError, match="nothing of an answer but its stop token"):
        examples(load("deepseek"), [user("q"), assistant("<think>r</think>")])


def test_tools_need_a_template_that_has_a_form_for_them(load):
    with pytest.raises(RowError, match=r"built-in chat template has no form.*data\.template"):
        examples(load("gpt2"), WITH_TOOL)


def test_a_template_that_refuses_a_row_is_a_problem_of_the_row(load, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(RowError, match="no system"):
        system = {"role": "system", "content": "s"}
        examples(load("qwen3"), [system, user("q"), assistant("a")], template=str(path))


def test_the_built_in_template_uses_only_tokens_that_exist(load):
    stories, gpt2 = load("stories"), load("gpt2")
    [example] = examples(stories, TWO_TURNS)
    assert stories.decode(example.ids) == (
        "<s> User:\nq1\n\nAssistant:\na1</s> \n\nUser:\nq2\n\nAssistant:\na2</s>"
    )
    assert example.ids[:2].tolist().count(stories.bos_token_id) == 1
    [example] = examples(gpt2, TWO_TURNS)
    assert gpt2.decode(example.ids).startswith("User:\nq1")


def test_a_tokenizer_without_a_stop_token_is_refused_for_chat(load):
    tokenizer = load("bert")
    template = resolve_template(tokenizer, DataConfig())
    assert template.built_in
    assert not template.stops
    with pytest.raises(DataError, match="no EOS token"):
        check_can_stop(template, tokenizer)


def test_a_template_without_a_stop_token_is_refused_for_chat(load, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    template = resolve_template(load("qwen3"), DataConfig(template=str(path)))
    with pytest.raises(DataError, match="no special token after an answer"):
        check_can_stop(template, load("qwen3"))


def test_the_stop_token_of_a_template_may_differ_from_eos(load, tmp_path):
    tokenizer = load("qwen3")
    text = tokenizer.chat_template.replace("<|im_end|>", "<|fim_pad|>")
    assert resolve_template(tokenizer, DataConfig()).stops == {"<|im_end|>": 151645}
    path = tmp_path / "template.jinja"
    path.write_text(text.replace("<|fim_pad|>", "<|object_ref_end|>"), "utf-8")
    [example] = examples(tokenizer, TWO_TURNS, template=str(path))
    assert [run[-18:] for run in trained_texts(tokenizer, example)] == ["<|object_ref_end|>"] * 2


def test_broken_templates_and_missing_files_are_config_errors(load, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match="cannot render"):
        resolve_template(load("gpt2"), DataConfig(template=str(path)))
    path.write_text("{% for m in messages %}x{% endfor %}")
    with pytest.raises(ConfigError, match="leaves out what the assistant says"):
        resolve_template(load("gpt2"), DataConfig(template=str(path)))
    with pytest.raises(ConfigError, match=r"data\.template cannot be read"):
        resolve_template(load("gpt2"), DataConfig(template=str(tmp_path / "absent")))


def test_text_gets_one_bos_and_an_end(load):
    tokenizer = load("stories")
    control = ControlTokens(tokenizer)
    plain, marked = text_examples(tokenizer, ["Once", "<s>Once"], control=control, end=True)
    assert plain.ids[0] == tokenizer.bos_token_id
    assert plain.ids[-1] == tokenizer.eos_token_id
    assert plain.trained.all()
    assert marked.ids.tolist().count(tokenizer.bos_token_id) == 1
    [open_end] = text_examples(tokenizer, ["Once"], control=control, end=False)
    assert open_end.ids.tolist() == tokenizer("Once").input_ids


LLAMA_HEADER = """
  {%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- macro today() %}{{ strftime_now(format="%Y-%m-%d") }}{% endmacro %}
"""


def render_with(tokenizer, text):
    template = Template(text, "file", ControlTokens(tokenizer))
    assert template.is_dated == ("strftime_now" in text)
    return render(tokenizer, [user("q")], template=template)


def test_templates_are_given_the_same_day_every_day(load):
    text = render_with(load("gpt2"), LLAMA_HEADER + "Today: {{ date_string }}, {{ today() }}")
    assert text.endswith("Today: 26 Jul 2024, 2024-07-26")


def test_a_fixed_date_changes_nothing_else(load):
    """White space and line ends at the start of a template are what Jinja's options make them."""
    for text in (
        "\n a {{ 1 }}\n",
        "  {% if true %}\n b{% endif %}",
        "\n{%- if true %}c{% endif %}",
    ):
        used = "{% if false %}{{ strftime_now('%d') }}{% endif %}"
        unused = used.replace("strftime_now('%d')", "1")
        assert render_with(load("gpt2"), text + used) == render_with(load("gpt2"), text + unused)


def test_dates_are_written_as_python_writes_them(load):
    for directive in ["%A %d. %B %y, %H:%M:%S", "%-d/%-m/%Y", "%j %p %I %U", "%d%m", "%s", "100"]:
        text = render_with(load("gpt2"), f"{{{{ strftime_now('{directive}') }}}}")
        assert text == DATE.strftime(directive)

import re
from pathlib import Path

import jinja2
import pytest

import jaxft
from jaxft.config import RunConfig, to_dict
from jaxft.reporting.pages import environment, keys_of, render, short_name

SOURCES = Path(jaxft.__file__).parent


def test_values_are_escaped_and_a_name_without_a_value_is_an_error():
    template = environment().from_string("<b title='{{ a }}'>{{ a }}</b>{{ missing }}")
    with pytest.raises(jinja2.UndefinedError, match="missing"):
        template.render(a="<")
    shown = environment().from_string("<b title='{{ a }}'>{{ a }}</b>").render(a="<'\"&")
    assert shown == "<b title='&lt;&#39;&#34;&amp;'>&lt;&#39;&#34;&amp;</b>"
    with pytest.raises(jinja2.UndefinedError):
        render("plans.html", title="t")


def test_no_text_is_marked_as_safe_and_no_python_writes_html():
    """What goes round the escaping would be found here."""
    around = re.compile(r"\|\s*safe\b|Markup\b|autoescape false|html\.escape|from html import")
    written = re.compile(r"</(a|b|code|div|p|section|span|svg|table|td|text|title)>")
    strays = [
        f"{file.relative_to(SOURCES)}: {match.group()}"
        for pattern, suffixes in ((around, (".py", ".html")), (written, (".py",)))
        for file in SOURCES.rglob("*")
        if file.suffix in suffixes
        for match in pattern.finditer(file.read_text("utf-8"))
    ]
    assert strays == []


def test_every_template_compiles():
    names = environment().list_templates(extensions=["html"])
    assert {"base.html", "report.html", "shardings.html", "plans.html"} <= set(names)
    for name in names:
        environment().get_template(name)


def test_keys_say_whether_they_differ_from_their_default():
    settings = to_dict(RunConfig()) | {"train.seed": 7, "data.train": "", "old.key": None}
    keys = {key.path: key for key in keys_of(settings)}
    assert [key.path for key in keys.values() if key.changed] == ["train.seed"]
    assert (keys["train.seed"].value, keys["train.seed"].default) == ("7", "0")
    assert (keys["old.key"].value, keys["old.key"].meaning) == ("", "")


def test_keys_of_an_objective_have_their_meaning_and_default():
    config = RunConfig()
    config.objective.name = "dpo"
    config.objective.dpo.beta = 0.5
    keys = {key.path: key for key in keys_of(to_dict(config))}
    assert [key.path for key in keys.values() if key.changed] == [
        "objective.name",
        "objective.dpo.beta",
    ]
    assert keys["objective.dpo.beta"].default == "0.1"
    assert keys["objective.dpo.beta"].meaning
    [key] = keys_of({"objective.name": "not_there.any_more"})
    assert (key.value, key.default) == ("not_there.any_more", "sft")


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/b/model/", "model"), ("org/model", "org/model"), ("a.jsonl,b.jsonl", "a.jsonl,b.jsonl")],
)
def test_paths_are_shortened_and_hub_ids_are_not(path, name):
    assert short_name(path) == name

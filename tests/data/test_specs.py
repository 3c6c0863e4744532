"""The one-line form of sources: names, options after colons, and what is wrong with them."""

import pytest

from jaxft.config import DataConfig
from jaxft.data.discovery import find_sources
from jaxft.data.specs import SourceSpec, parse_specs
from jaxft.errors import ConfigError


def parse(text, **config):
    return parse_specs(text, DataConfig(**config))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", {"name": "a.jsonl"}),
        ("a.jsonl:0.3", {"name": "a.jsonl", "weight": 0.3}),
        ("a.jsonl:limit=1000:2", {"name": "a.jsonl", "weight": 2.0, "limit": 1000}),
        (
            "faq.txt:format=text:text_split=line",
            {"format": "text", "text_split": "line", "names_split": True},
        ),
        (
            "a.csv:format=columns:prompt=question:completion=the answer:system=rules",
            {
                "format": "columns",
                "columns": (
                    ("prompt", "question"),
                    ("completion", "the answer"),
                    ("system", "rules"),
                ),
            },
        ),
        (
            "a.csv:prompt=q:completion=a",
            {"format": "columns", "columns": (("prompt", "q"), ("completion", "a"))},
        ),
        ("a.csv:text=body", {"format": "text", "columns": (("text", "body"),)}),
        ("org/name", {"name": "org/name"}),
        ("org/name:config[train]:weight=0.3", {"name": "org/name:config[train]", "weight": 0.3}),
        ("org/name[a:b,c]:limit=5", {"name": "org/name[a:b,c]", "limit": 5}),
        ("more/*.jsonl:0.5", {"name": "more/*.jsonl", "weight": 0.5}),
    ],
)
def test_options_follow_after_colons(text, expected):
    [spec] = parse(text)
    assert {name: getattr(spec, name) for name in expected} == expected
    untouched = SourceSpec.__dataclass_fields__.keys() - expected.keys() - {"name"}
    plain = SourceSpec(name=spec.name)
    assert all(getattr(spec, name) == getattr(plain, name) for name in untouched)


def test_sources_are_separated_by_commas_outside_of_brackets():
    assert [spec.name for spec in parse(" a.jsonl , org/n[train,x],,b.csv:text=t")] == [
        "a.jsonl",
        "org/n[train,x]",
        "b.csv",
    ]


def test_a_file_that_exists_keeps_its_colons_and_commas(tmp_path):
    for name in ("a:0.3", "b:format=text.jsonl", "c, d.jsonl", "e:1.jsonl", "e:2.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    names = [f"{tmp_path}/{name}" for name in ("a:0.3", "b:format=text.jsonl", "c, d.jsonl")]
    specs = parse(f"{names[0]}:0.5, {names[1]}:limit=3:1,{names[2]}:2,{tmp_path}/e:*.jsonl:1")
    assert [spec.name for spec in specs] == [*names, f"{tmp_path}/e:*.jsonl"]
    assert [spec.weight for spec in specs] == [0.5, 1, 2, 1]
    assert len(find_sources(",".join(f"{name}:1" for name in names))) == 3


def test_what_a_source_does_not_say_the_configuration_does():
    config = {"format": "columns", "columns": "prompt=q,completion=a", "text_split": "line"}
    plain, text, other, lines = parse(
        "a.csv,faq.txt:format=text,c.csv:prompt=x:completion=y,d.txt:format=text:text_split=file",
        **config,
    )
    assert (plain.format, plain.mapping) == ("columns", {"prompt": "q", "completion": "a"})
    assert (text.format, text.mapping, text.text_split) == ("text", {"text": "text"}, "line")
    assert other.mapping == {"prompt": "x", "completion": "y"}
    assert lines.text_split == "file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jsonl:fromat=text", r"no option 'fromat=text'. Did you mean 'format'\?"),
        ("a/b/c.jsonl:config:wieght=1", r"'wieght=1'. Did you mean 'weight'\?"),
        ("a.jsonl:format=jsonl", "format is 'jsonl'; expected one of auto"),
        ("a.jsonl:text_split=lines", r"'lines'; expected .* Did you mean 'line'\?"),
        ("a.csv:prompt=q", "does not say which column is the completion; write completion="),
        ("a.csv:format=alpaca:prompt=q:completion=a", "names columns, but the format is 'alpaca'"),
        ("a.csv:format=text:prompt=q", "names 'prompt'; expected text"),
        ("a.csv:prompt=q:prompt=r", "names prompt twice"),
        ("a.jsonl:limit=0", "limit is '0'; expected a whole number of rows above 0"),
        (f"a.jsonl:limit={'9' * 5000}", "expected a whole number of rows"),
        ("a.jsonl:0", "weight is '0'; expected a number above 0"),
        ("a.jsonl:weight=1e999", "expected a number above 0"),
        ("a.jsonl:weight=nan", "weight is 'nan'; expected a number above 0"),
        ("a.jsonl:0.3,b.jsonl", r"'a.jsonl' has a weight and 'b.jsonl' has none.*'b.jsonl:0.5'"),
    ],
)
def test_what_cannot_be_understood_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_columns_of_a_mistyped_format_are_not_complained_about():
    with pytest.raises(ConfigError) as error:
        parse("task.csv:format=colums:prompt=text:completion=label")
    assert len(error.value.problems) == 1
    assert "format is 'colums'" in error.value.problems[0]
    assert "Did you mean 'columns'?" in error.value.problems[0]


def test_wrong_options_of_all_sources_come_together():
    with pytest.raises(ConfigError) as error:
        parse("a.jsonl:limt=3,b.jsonl:wait=3")
    assert len(error.value.problems) == 2


@pytest.mark.parametrize("option", ["0.5", "limit=2"])
def test_a_weight_or_limit_that_is_given_twice_is_refused(option):
    with pytest.raises(ConfigError, match=r"'a\.jsonl' is named twice"):
        parse_specs(f"a.jsonl:{option},a.jsonl:{option}", DataConfig())
    assert len(parse_specs("a.jsonl,a.jsonl", DataConfig())) == 2


def test_a_column_that_is_mapped_twice_is_refused():
    with pytest.raises(ConfigError, match="same part twice"):
        parse("a.csv", format="columns", columns="prompt=a,prompt=b,completion=c")

"""YAML and JSON config files: what they hold, and every mistake with its line."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.config import RunConfig, describe, from_dict, to_dict, to_yaml, walk
from jaxft.config_file import _ONE_LINE, read_file
from jaxft.errors import ConfigError
from jaxft.files import write_text
from jaxft.flags import read_config


def read(tmp_path, text: str, name: str = "run.yaml") -> RunConfig:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_file(str(path))


def problems(tmp_path, text: str, name: str = "run.yaml") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, name)
    return [problem.removeprefix(f"{tmp_path}/") for problem in caught.value.problems]


def test_groups_nest_or_have_dots(tmp_path):
    config = read(
        tmp_path,
        "model: {path: base}\noptim:\n  learning_rate: 1e-5\ntrain.steps: 7\nstrategy: fsdp_tp\n"
        "mesh:\n  tensor: 2\n",
    )
    expected = RunConfig()
    expected.model.path, expected.strategy, expected.mesh.tensor = "base", "fsdp_tp", 2
    expected.optim.learning_rate, expected.train.steps = 1e-5, 7
    assert config == expected


def test_flags_override_a_yaml_file(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("model.path: base\ntrain: {steps: 7, batch_size: 2}\n")
    config = read_config(str(path), ["--config.train.steps=9"])
    assert (config.train.steps, config.train.batch_size) == (9, 2)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("optim.learning_rate: 1e-5", "optim.learning_rate", 1e-5),  # YAML 1.1: a text
        ("optim.learning_rate: 2E+0", "optim.learning_rate", 2.0),
        ("optim.learning_rate: .5", "optim.learning_rate", 0.5),
        ("train.epochs: 3", "train.epochs", 3.0),
        ("train.save_every: 1_000", "train.save_every", 1000),
        ("data.shuffle: no", "data.shuffle", False),
        ("data.shuffle: On", "data.shuffle", True),
        ("train.compilation_cache: off", "train.compilation_cache", "off"),
        ("model.revision: 0123456", "model.revision", "0123456"),
        ("model.revision: 1234e5", "model.revision", "1234e5"),
        ("data.validation: 5%", "data.validation", "5%"),
        ("train.wandb: 'true'", "train.wandb", "true"),
        ("data.train: ''", "data.train", ""),
        ("data.train: >\n  a.jsonl,\n  b.jsonl\n", "data.train", "a.jsonl, b.jsonl"),
    ],
)
def test_values_are_read_by_the_type_of_their_key(tmp_path, line, key, value):
    found = to_dict(read(tmp_path, line))[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim:\n  learning_rat: 1", "run.yaml:2: Unknown key 'optim.learning_rat'. Did you mean"),
        ("train:\n  steps: many", "run.yaml:2: train.steps is many; expected a whole number."),
        ("train.steps: 1.5", "run.yaml:1: train.steps is 1.5; expected a whole number."),
        ("train.steps: '7'", "Leave the quotes out."),
        ("train.steps: 010", "another number in YAML 1.1"),
        ("train.steps: 1:30", "expected a whole number"),
        ("train.steps: true", "expected a whole number"),
        ("train.steps:", "train.steps is empty; expected a whole number. Leave the key out"),
        ("train.steps: [1]", "train.steps is a list; expected a whole number"),
        ("optim.learning_rate: .nan", "expected a number"),
        ("data.shuffle: 1", "data.shuffle is 1; expected true or false"),
        ("train.wandb: true", "expected a text. Put it in quotes"),
        ("data.train: ~", "Write '' for none."),
        ("model.path: {a: b}", "model.path is a group; expected a text"),
        ("\n\nmodel.dtypes: fp8", "run.yaml:3: model.dtypes is 'fp8'; expected one of mixed"),
        ("train.batch_size: 0", "run.yaml:1: train.batch_size is 0; expected at least 1"),
        ("train.steps: 1\ntrain: {steps: 2}", "run.yaml:2: train.steps is set twice, in line 1"),
        ("train: 7", "run.yaml:1: train is a group of keys"),
        ("optim: &o {beta1: 0.5}\n<<: *o", "run.yaml:2: '<<' is not read"),
        ("model.path: !!python/name:os.system", "has the tag"),
        ("- a", "expected keys and values"),
        ("", "expected keys and values"),
        ("a: b: c", "run.yaml:1: broken YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "run.yaml:2: broken YAML: expected a single document"),
        ("train:\n\tsteps: 1", "run.yaml:2: broken YAML"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, text, words):
    assert any(words in problem for problem in problems(tmp_path, text))


def test_all_mistakes_are_reported_at_once(tmp_path):
    text = "train:\n  steps: many\n  stepz: 1\nmodel:\n  dtypes: fp8\n"
    assert [p.partition(" ")[0] for p in problems(tmp_path, text)] == [
        "run.yaml:2:",
        "run.yaml:3:",
        "run.yaml:5:",
    ]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("data.train: [a.jsonl, 'b.jsonl:0.3']", "data.train", "a.jsonl,b.jsonl:0.3"),
        (
            "data.train:\n- path: a.jsonl\n- {path: 'o/n:c[s,t]', weight: 0.3, format: text}\n",
            "data.train",
            "a.jsonl,o/n:c[s,t]:weight=0.3:format=text",
        ),
        (
            "data.train:\n  path: a.csv\n  format: columns\n  columns: {prompt: q, completion: a}",
            "data.train",
            "a.csv:format=columns:prompt=q:completion=a",
        ),
        ("data.columns: {prompt: q, completion: a}", "data.columns", "prompt=q,completion=a"),
        ("model.add_tokens: [<a>, <b>]", "model.add_tokens", "<a>,<b>"),
        (
            "eval.datasets:\n  easy: a.jsonl\n  hard: [b.jsonl, c.jsonl]",
            "eval.datasets",
            "easy=a.jsonl;hard=b.jsonl,c.jsonl",
        ),
    ],
)
def test_lists_and_mappings_become_the_one_line_form(tmp_path, text, key, value):
    assert to_dict(read(tmp_path, text))[key] == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data.train: ['a,b.jsonl']", "',' separates parts"),
        ("data.train: [{path: a, prefix: 'x:y'}]", "':' separates options"),
        ("data.train: [{weight: 1}]", "a source without 'path'"),
        ("data.train: [{path: a, path: b}]", "'path' twice"),
        ("data.train: [[a]]", "a list in a list"),
        ("data.train: []", "an empty list"),
        ("data.train: [a, ~]", "an empty part"),
        ("eval.datasets: {x: a, x: b}", "'x' twice"),
        ("eval.datasets: {x: 'a;b'}", "';' separates parts"),
        ("data.columns: {'a=b': c}", "'=' separates parts"),
        ("data.columns: [a]", "holds a list"),
    ],
)
def test_what_the_one_line_form_cannot_say_is_refused(tmp_path, text, words):
    [problem] = problems(tmp_path, text)
    assert problem.startswith("run.yaml:1: ") and words in problem


def test_keys_with_a_form_of_their_own_exist():
    assert _ONE_LINE.keys() <= {item.path for item in walk(RunConfig()) if item.type is str}


def test_json_is_read_with_lines_tabs_and_escapes(tmp_path):
    text = '{\n\t"train": {\n\t\t"steps":7, "wandb": "\\ud83d\\ude00\\/\\t"},\n\t"mesh.data": -1\n}'
    config = read(tmp_path, text, "run.json")
    assert (config.train.steps, config.train.wandb, config.mesh.data) == (7, "😀/\t", -1)
    assert problems(tmp_path, '{\n\t"train": {\n\t\t"stepz": 7}}', "run.json")[0].startswith(
        "run.json:3: Unknown key 'train.stepz'. Did you mean 'train.steps'?"
    )
    assert problems(tmp_path, '{"train":\n{steps: 7}}', "run.json")[0].startswith(
        "run.json:2: broken JSON"
    )
    assert "twice" in problems(tmp_path, '{"train.steps": 7,\n"train.steps": 8}', "run.json")[0]
    assert "NaN is no JSON" in problems(tmp_path, '{"train.epochs": NaN}', "run.json")[0]


def test_the_config_of_a_workdir_is_a_config_file(tmp_path):
    config = RunConfig()
    config.optim.learning_rate, config.data.train = 3e-7, "a,b: c.jsonl"
    write_text(tmp_path / "config.json", json.dumps(to_dict(config), indent=2))
    assert read_file(str(tmp_path / "config.json")) == config


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["no", "1e5", "010", "~", "a: b", "# a", " a ", "true", "1:30", "'", "\x85a\u2028\x00"]
)


@settings(max_examples=60, deadline=None)
@given(text=texts, number=st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_printed_reads_back_alike_here_and_elsewhere(tmp_path_factory, text, number):
    config = RunConfig()
    config.train.wandb, config.model.revision, config.optim.warmup_steps = text, text, 12
    config.optim.weight_decay, config.data.shuffle = abs(number), False
    folder = tmp_path_factory.mktemp("printed")
    assert read(folder, describe(config)) == config
    assert read(folder, to_yaml(to_dict(config))) == config
    nested = yaml.safe_load(describe(config))
    flat = {
        f"{group}.{key}" if isinstance(value, dict) else group: item
        for group, value in nested.items()
        for key, item in (value if isinstance(value, dict) else {"": value}).items()
    }
    assert from_dict(flat) == config


@pytest.mark.parametrize("name", ["run.toml", "run"])
def test_other_files_are_refused_by_name(tmp_path, name):
    [problem] = problems(tmp_path, "x = 1", name)
    assert problem == f"{name}: a config file ends in .py, .yaml, .yml or .json."


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(str(tmp_path / "run.yaml"))

"""Config files and flags that change them."""

import pytest

from jaxft.errors import ConfigError
from jaxft.flags import read_config, take_overrides

FILE = """
import jaxft

def get_config():
    config = jaxft.RunConfig()
    config.model.path = "base"
    config.optim.learning_rate = 1e-3
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(FILE)
    return str(path)


def test_flags_override_the_file_and_the_file_the_defaults(file):
    config = read_config(file, ["--config.optim.learning_rate=2e-5", "--config.mesh.fsdp=4"])
    assert (config.model.path, config.optim.learning_rate, config.mesh.fsdp) == ("base", 2e-5, 4)
    assert config.optim.beta1 == 0.9


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--config.data.shuffle=false", False),
        ("--config.data.shuffle=true", True),
    ],
)
def test_truth_values_are_read(file, flag, expected):
    assert read_config(file, [flag]).data.shuffle is expected


def test_texts_with_commas_and_equals_signs_arrive_whole(file):
    flags = ["--config.data.train=a.jsonl,b.jsonl", "--config.eval.datasets=x=1.jsonl;y=2.jsonl"]
    config = read_config(file, flags)
    assert config.data.train == "a.jsonl,b.jsonl"
    assert config.eval.datasets == "x=1.jsonl;y=2.jsonl"


def test_unknown_keys_wrong_types_and_impossible_values_are_all_reported(file):
    with pytest.raises(ConfigError) as caught:
        read_config(
            file,
            [
                "--config.optim.learning_rat=1",
                "--config.train.steps=many",
                "--config.model.dtypes=fp8",
                "--config.train.batch_size=7",
                "--config.train.accumulation=2",
                "--config.mesh=3",
            ],
        )
    text = "\n".join(caught.value.problems)
    for words in (
        "Unknown key '--config.optim.learning_rat'. Did you mean '--config.optim.learning_rate'?",
        "train.steps is 'many'; expected a whole number.",
        "model.dtypes is 'fp8'",
        "not divisible",
        "Unknown key '--config.mesh'; mesh has stage, data",
    ):
        assert words in text


def test_without_a_file_the_defaults_are_the_start():
    config = read_config("", ["--config.model.path=org/name"])
    assert config.model.path == "org/name"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no config file"),
        ("x = 1", "defines get_config()"),
        ("def get_config(): return {}", "returned a dict; expected a jaxft.RunConfig"),
        ("import nonsense_module", "No module named 'nonsense_module'"),
        ("def get_config(:", "SyntaxError"),
        (
            "import jaxft\ndef get_config():\n c = jaxft.RunConfig()\n c.optim.lr = 1\n return c",
            "has no attribute 'lr'",
        ),
    ],
)
def test_a_config_file_that_cannot_be_used_is_explained(tmp_path, content, words):
    path = tmp_path / "run.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_config(str(path), [])
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_keys_are_set_with_and_without_the_first_word():
    words = ["--config.data.format=text", "--optim.learning_rate", "2e-5", "--strategy=tp"]
    assert take_overrides([*words, "--mesh.data", "-1"]) == [
        "--config.data.format=text",
        "--config.optim.learning_rate=2e-5",
        "--config.strategy=tp",
        "--config.mesh.data=-1",
    ]


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("--learning_rate=2e-5", "Did you mean --config.optim.learning_rate=2e-5?"),
        ("--learning_rat=2e-5", "Did you mean --config.optim.learning_rate=2e-5?"),
        ("--batch_size=4", "--config.train.batch_size=4 or --config.eval.batch_size=4?"),
        ("--path", "Did you mean --config.model.path or --config.adapter.path?"),
        ("--adaptor.rank=4", "Did you mean '--config.adapter.rank'?"),
        ("--resum", "Did you mean '--resume'?"),
        ("learning_rate=2", "Unknown argument 'learning_rate=2'."),
    ],
)
def test_the_last_part_of_a_key_alone_is_answered_with_the_whole(word, words):
    with pytest.raises(ConfigError) as caught:
        take_overrides([word], ["--resume"])
    [problem] = caught.value.problems
    assert words in problem


def test_a_switch_without_a_value_is_answered_with_the_value():
    with pytest.raises(ConfigError, match=r"no value; write --adapter\.dora=true"):
        take_overrides(["--adapter.dora"])


@pytest.mark.parametrize("word", ["--optim.learning_rat=1", "--config.optim.learning_rat=1"])
def test_a_misspelt_key_is_answered_with_a_flag(word):
    [flag] = take_overrides([word])
    with pytest.raises(ConfigError, match=r"Did you mean '--config\.optim\.learning_rate'\?"):
        read_config("", [flag], validate=False)

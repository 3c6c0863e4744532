"""Keys, defaults, checks and their messages."""

import pytest

from jaxft.config import (
    RunConfig,
    compiler_options,
    describe,
    from_dict,
    to_dict,
    unknown_key,
    walk,
)
from jaxft.errors import ConfigError


def complete() -> RunConfig:
    config = RunConfig()
    config.model.path, config.data.train, config.train.workdir = "model", "train.jsonl", "run"
    return config


def problems_of(config: RunConfig, *, training: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.validate(training=training)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_a_complete_config_is_valid():
    complete().validate(training=True)


def test_every_key_says_what_it_means_and_has_a_default_of_its_type():
    for item in walk(RunConfig()):
        assert item.meaning.endswith("."), item.path
        assert item.type in (int, float, str, bool), item.path
        assert item.is_typed and item.value == item.default, item.path
        assert not list(item.problems()), item.path


def test_there_are_few_keys():
    assert len(list(walk(RunConfig()))) <= 100


def test_all_problems_are_reported_at_once():
    config = complete()
    config.model.path = ""
    config.train.batch_size, config.train.accumulation = 7, 2
    config.optim.schedule = "cosin"
    config.optim.beta1 = 1.5
    config.mesh.data = config.mesh.fsdp = -1
    text = "\n".join(problems_of(config))
    assert "model.path is empty" in text
    assert "batch_size 7 is not divisible by train.accumulation 2" in text
    assert "'cosin'; expected one of" in text and "Did you mean 'cosine'?" in text
    assert "optim.beta1 is 1.5; expected at most 0.999999" in text
    assert "Only one mesh axis can be -1, not mesh.data, mesh.fsdp" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: setattr(c.train, "steps", 1.5), "train.steps is 1.5; expected a whole number"),
        (lambda c: setattr(c.data, "shuffle", 1), "data.shuffle is 1; expected true or false"),
        (lambda c: setattr(c.train, "batch_size", 0), "expected at least 1"),
        (lambda c: setattr(c.optim, "learning_rate", float("nan")), "expected a finite number"),
        (lambda c: setattr(c.data, "columns", "prompt=q"), "set --config.data.format=columns"),
        (lambda c: setattr(c.data, "format", "columns"), "data.columns is empty"),
        (lambda c: setattr(c.eval, "patience", 2), "data.validation is empty"),
        (lambda c: setattr(c.eval, "best", "answers"), "set --config.eval.answers=label"),
        (lambda c: setattr(c.optim, "freeze", "("), "not a regular expression"),
        (lambda c: setattr(c.mesh, "tensor", -2), "expected a device count, 0 or -1"),
        (lambda c: setattr(c.train, "epochs", 0), "both 0"),
        (lambda c: setattr(c.model, "add_tokens", "<a>,,<b>"), "an empty or a repeated token"),
        (lambda c: setattr(c.model, "add_tokens", "<a>, <a>"), "an empty or a repeated token"),
        (lambda c: setattr(c.adapter, "ranks", "q=2.9"), "has q=2.9; expected whole numbers"),
        (lambda c: setattr(c.adapter, "ranks", "q=2,q=6"), "has the pattern 'q' twice"),
        (lambda c: setattr(c.adapter, "alphas", "q=0.0"), "has q=0; expected numbers above 0"),
        (lambda c: setattr(c.adapter, "targets", '["q_proj"]'), "Separate names by '|'"),
        (lambda c: setattr(c.optim, "lora_plus", 0.0), "optim.lora_plus is 0.0; expected"),
    ],
)
def test_a_wrong_value_or_combination_is_named(change, words):
    config = complete()
    change(config)
    assert any(words in problem for problem in problems_of(config))


def test_keys_that_an_adapter_to_go_on_from_has_itself_are_refused():
    config = complete()
    config.adapter.path, config.model.tokenizer, config.model.add_tokens = "a", "other", "<a>"
    found = problems_of(config)
    assert [problem.split()[0] for problem in found] == ["model.tokenizer", "model.add_tokens"]


def test_random_weights_are_not_held_in_codes():
    config = complete()
    config.adapter.rank, config.model.quantise, config.model.random_init = 2, "nf4", True
    [problem] = problems_of(config)
    assert "model.random_init has none that could be read again" in problem


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.quantise", "nf4", "weights would be rounded twice"),
        ("objective.reference", "cached", "computed without model.matmul 'int8'"),
    ],
)
def test_products_of_8_bit_numbers_are_of_whole_weights_and_compared_with_the_same(
    key, value, words
):
    values = {"adapter.rank": 2, "objective.name": "dpo", "model.matmul": "int8", key: value}
    config = from_dict(to_dict(complete()) | values)
    [problem] = problems_of(config)
    assert words in problem


def test_a_warm_up_longer_than_the_run_is_refused():
    config = complete()
    config.train.steps, config.optim.warmup_steps = 10, 11
    assert "exceeds train.steps 10" in problems_of(config)[0]


def test_training_needs_data_and_a_workdir_and_evaluation_does_not():
    config = RunConfig()
    config.model.path = "model"
    config.validate()
    assert [p.split()[0] for p in problems_of(config, training=True)] == [
        "data.train",
        "train.workdir",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: setattr(c.eval, "answers", "exact"), "data.validation is empty"),
        (lambda c: setattr(c.optim, "learning_rate", 0.0), "nothing would train"),
    ],
)
def test_what_a_training_run_would_not_do_is_refused_for_it_alone(change, words):
    config = complete()
    config.data.validation = ""
    change(config)
    config.validate()
    [problem] = problems_of(config, training=True)
    assert words in problem


def test_dict_form_holds_everything():
    config = complete()
    config.mesh.tensor, config.optim.learning_rate = 2, 3e-4
    assert from_dict(to_dict(config)) == config


def test_unknown_keys_come_with_the_nearest_known_one():
    assert "Did you mean 'optim.learning_rate'?" in unknown_key("optim.learning_rat")
    assert "Did you mean 'optim.learning_rate'?" in unknown_key("learning_rate")
    assert "'train.batch_size' or 'eval.batch_size'?" in unknown_key("batch_size")
    assert "mesh has stage, data" in unknown_key("mesh")
    assert "optim has name, learning_rate, schedule" in unknown_key("optim.lr")
    assert "Did you mean 'strategy'?" in unknown_key("stratgy")
    with pytest.raises(ConfigError, match="workdir"):
        from_dict({"train.workdirr": "x"})


def test_description_marks_what_is_not_default():
    lines = describe(complete()).splitlines()
    assert '  path: model  # default: ""' in lines
    assert "  seed: 0" in lines and "  learning_rate: 1.0e-05" in lines
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("xla_a=1", {"xla_a": "1"}),
        ("xla_a=98304,xla_b=true", {"xla_a": "98304", "xla_b": True}),
        ("--xla_a=False, --xla_b=x", {"xla_a": False, "xla_b": "x"}),
        ("xla_a=b=c", {"xla_a": "b=c"}),
        ("xla_a=1,xla_a=2", {"xla_a": "2"}),
    ],
)
def test_compiler_options_are_names_and_values(text, options):
    assert compiler_options(text) == options


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("xla_a", "xla_a"),
        ("xla_a=", "xla_a="),
        ("=1", "=1"),
        ("xla_a=1,", ""),
        ("xla_a=1,,xla_b=2", ""),
    ],
)
def test_a_compiler_option_without_name_or_value_is_refused(text, part):
    config = complete()
    config.train.compiler_options = text
    [problem] = problems_of(config)
    assert f"train.compiler_options has {part!r}; expected 'xla_name=value'" in problem


def test_what_layers_keep_and_move_is_checked_with_the_rest():
    config = complete()
    config.model.remat, config.model.offload = "qkv+atention", ""
    config.train.compiler_options = "xla_a"
    text = "\n".join(problems_of(config))
    assert "model.remat is 'qkv+atention'" in text and "Did you mean 'attention'?" in text
    assert "train.compiler_options has 'xla_a'" in text
    config = complete()
    config.model.remat, config.model.offload = "qkv+attention", "inputs+mlp"
    [problem] = problems_of(config)
    assert "model.offload names mlp, which model.remat 'qkv+attention' does not keep" in problem
    config.model.offload = "inputs+attention"
    config.validate()

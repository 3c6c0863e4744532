"""Runs on preferences from data to report: the reference, the start, resuming, evaluation."""

import copy
import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest

import jaxft
from jaxft.config import RunConfig, from_dict, to_dict, to_yaml
from jaxft.errors import CheckpointError, ConfigError, TrainingError
from jaxft.extensions import load_named
from jaxft.flags import read_config
from jaxft.programs import reference, session
from jaxft.programs.comparison import compare
from jaxft.programs.evaluation import evaluate, evaluate_pair
from jaxft.programs.held_out import UnitSums, describe_figures
from jaxft.programs.reference import digest_of
from jaxft.programs.tables import print_comparison, print_evaluation
from jaxft.training.objectives import sft
from jaxft.training.objectives.bound import BoundObjective
from jaxft.training.objectives.contract import Objective, Terms
from jaxft.training.objectives.recorded import RECORDED
from tests.tiny import load_tiny, make_program
from tests.tiny_run import (
    assert_same_arrays,
    read_metrics,
    read_records,
    tiny_config,
    write_base,
    write_chats,
)


def write_pairs(path, count, *, seed=0):
    """Writes pairs whose chosen answers are longer, one a line; returns the path."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        word = "".join(draw.choices("abcdef", k=draw.randint(2, 7)))
        row = {"prompt": f"say {word} {number}", "chosen": word[::-1] + "x", "rejected": "z" + word}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    write_base(folder / "base")
    write_pairs(folder / "train.jsonl", 24)
    write_pairs(folder / "held_out.jsonl", 9, seed=1)
    write_chats(folder / "retention.jsonl", 6, seed=2)
    return folder


@pytest.fixture
def config(home, tmp_path):
    def make(name="dpo", **changes):
        config = tiny_config(home, data__max_length=80, train__steps=4, **changes)
        config.train.workdir = str(tmp_path / config.train.workdir.rpartition("/")[2])
        config.objective.name = name
        config.data.validation = str(home / "held_out.jsonl")
        return config

    return make


def train(config, **options):
    return jaxft.train(config, **options)


def evaluations(workdir, name="validation"):
    return [r for r in read_records(workdir / "eval.jsonl") if r["dataset"] == name]


def test_dpo_starts_at_ln_2_and_learns_what_is_preferred(home, config):
    run = config(eval__retention=str(home / "retention.jsonl"), train__log_every=2)
    result = train(run)
    before, after = evaluations(result.workdir)
    assert before["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert (before["margin"], before["accuracy"]) == (0, 0.5)
    assert after["loss"] < 0.65 and after["accuracy"] > 0.9
    assert after["loss_low"] < after["loss"] < after["loss_high"]
    assert after["chosen_reward"] - after["rejected_reward"] == pytest.approx(after["margin"])
    assert "perplexity" not in after and after["weight"] == 9
    # What the model knew is measured on text, in nats per token.
    kept = evaluations(result.workdir, "retention")
    assert len(kept) == 2 and {"perplexity", "bits_per_byte"} < kept[0].keys()
    records = read_records(result.workdir / "metrics.jsonl")
    assert records[-1]["accuracy"] > 0.9 > records[0]["loss"]


@pytest.mark.slow(seconds=6)
def test_a_cached_reference_trains_as_a_fixed_one(config):
    fixed = train(config(train__workdir="fixed")).workdir
    cached = train(config(train__workdir="cached", objective__reference="cached")).workdir
    for a, b in zip(read_metrics(fixed), read_metrics(cached), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert evaluations(fixed)[-1]["loss"] == pytest.approx(evaluations(cached)[-1]["loss"])


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("kind", ["fixed", "cached"])
def test_a_resumed_run_compares_with_the_weights_it_was_started_from(config, kind):
    whole = config(train__workdir="whole", objective__reference=kind)
    parts = config(train__workdir="parts", objective__reference=kind)
    train(whole)
    parts.train.steps = 2
    train(parts)
    parts.train.steps = 4
    result = train(parts, resume=True)
    assert_same_arrays(result.checkpoint, result.workdir.parent / "whole/checkpoints/4")
    assert evaluations(result.workdir)[-1] == evaluations(result.workdir.parent / "whole")[-1]


@pytest.mark.slow(seconds=3)
def test_a_run_whose_starting_weights_have_changed_is_not_resumed(config, monkeypatch):
    run = config()
    run.train.steps = 2
    train(run)
    run.train.steps = 4
    monkeypatch.setattr(reference, "digest_of", lambda params: "other")
    with pytest.raises(CheckpointError, match="are not those that the run was started with"):
        train(run, resume=True)


@pytest.mark.slow(seconds=2)
def test_a_reference_of_other_weights_is_noticed_at_the_start(config, monkeypatch, tmp_path):
    def score(evaluator, params, held_out, *, batch_size):
        yield np.full((len(held_out.numbers), 80), -9.0, np.float32)

    monkeypatch.setattr(reference, "score_rows", score)
    run = config()
    run.data.cache = str(tmp_path / "cache")
    with pytest.raises(TrainingError, match=r"At the start the loss is .* must be 0\.6931"):
        train(run)


@pytest.mark.slow(seconds=6)
def test_scores_are_kept_by_all_they_depend_on_and_made_anew_if_damaged(config, tmp_path):
    run = config()
    run.data.cache = str(tmp_path / "cache")
    run.train.steps = 2
    train(run)
    kept = set((tmp_path / "cache").glob("reference-*/scores.npy"))
    assert len(kept) == 1
    run.strategy, run.mesh.data, run.mesh.fsdp = "fsdp", 1, 2
    train(run, overwrite=True)
    assert len(set((tmp_path / "cache").glob("reference-*/scores.npy"))) == 2
    for file in kept:
        file.write_bytes(file.read_bytes()[:200])
    again = config(train__workdir="again")
    again.data.cache, again.train.steps = str(tmp_path / "cache"), 2
    assert evaluations(train(again).workdir)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.slow(seconds=4)
def test_held_out_answers_of_one_label_alone_are_evaluated(home, config, tmp_path):
    rows = [{"prompt": f"say {c}", "completion": c * 3, "label": True} for c in "abcde"]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = config("kto")
    run.train.steps = 2
    run.data.validation = str(tmp_path / "good.jsonl")
    before = evaluations(train(run).workdir)[0]
    assert before["chosen_reward"] == 0 and before["rejected_reward"] is None


@pytest.mark.slow(seconds=6)
def test_what_is_compared_with_is_named_or_known(home, config):
    run = config()
    result = train(run)
    folder = jaxft.export(result.checkpoint, result.workdir / "exported", on_log=lambda text: None)
    known = evaluate(run, folder)["validation"]
    assert known.sums.loss.value == pytest.approx(evaluations(result.workdir)[-1]["loss"], rel=1e-5)
    assert known.reference is not None and known.reference.path == str(home / "base")
    run.model.path = ""
    # A run knows what it started from.
    assert evaluate(run, result.workdir)["validation"].sums.loss.value == known.sums.loss.value
    with pytest.raises(ConfigError, match="does not name"):
        evaluate(run, folder)
    own, other = (evaluate(run, result.workdir)["validation"] for _ in range(2))
    moved = dataclasses.replace(other, reference=other.reference._replace(weights="x", path="y"))
    with pytest.raises(ConfigError, match="are compared with different references"):
        compare({"validation": own}, {"validation": moved})


@pytest.mark.parametrize("name", ["dpo", "kto", "simpo"])
def test_evaluation_is_planned_with_the_columns_of_the_objective(name):
    program = make_program(load_tiny("gqa"), objective__name=name)
    config = from_dict({"objective.name": name, "data.max_length": 24})
    batch = program.evaluator.abstract_rows(config, 4)
    assert ("reference" in batch, "kl" in batch) == (name != "simpo", name == "kto")
    program.evaluator.eval_step.lower(program.state.params, batch)


@pytest.mark.slow(seconds=2)
def test_the_first_step_is_held_to_what_must_hold_at_the_start(config, monkeypatch):
    run = config()
    run.data.validation = ""
    monkeypatch.setattr(session, "_START_TOLERANCE", -1.0)
    with pytest.raises(TrainingError, match=r"loss is 0\.6931, and must be 0\.6931"):
        train(run)


@pytest.mark.slow(seconds=7)
def test_two_models_are_compared_by_pairs(home, config, capsys):
    run = config()
    result = train(run)
    base, tuned = evaluate_pair(run, home / "base", result.workdir)
    difference = compare(base, tuned)["validation"].differences
    assert difference["loss"].value < 0 and difference["loss"].high < 0
    assert (
        difference["accuracy"].value == tuned["validation"].sums.estimates["accuracy"].value - 0.5
    )
    assert difference["margin"].count == 9
    print_comparison(compare(base, tuned), "base", "tuned", run)
    out = " ".join(capsys.readouterr().out.split())
    assert "9 pairs" in out and "loss, per pair" in out and "preferred answers" in out
    # The command finds the reference of a run by itself.
    alone = evaluate(run, result.workdir)["validation"].sums
    assert alone.loss.value == pytest.approx(evaluations(result.workdir)[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("units", "words"),
    [("pairs", "preferred answers ranked first"), ("labelled", "answers judged as labelled")],
)
def test_a_line_says_what_the_accuracy_is_of(units, words):
    accuracy = np.array([1.0, 1.0, 1.0, 0.0]), np.ones(4)
    sums = UnitSums(np.full(4, 0.5), np.ones(4), {"accuracy": accuracy})
    assert describe_figures(sums, units) == ["loss 0.5000", f"{words} 75.0%"]


@pytest.mark.slow(seconds=6)
def test_pairs_of_models_with_other_tokens_are_compared_one_by_one(home, config, tmp_path, capfd):
    other = shutil.copytree(home / "base", tmp_path / "other")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = [["a", "b"]]
    tokenizer["model"]["vocab"]["ab"] = len(tokenizer["model"]["vocab"])
    tokenizer["pre_tokenizer"] = None
    file.write_text(json.dumps(tokenizer))
    results = evaluate_pair(config("simpo"), home / "base", other)
    said = " ".join(capfd.readouterr().err.split())
    assert "Each pair is compared with itself" in said
    assert "bits per byte" not in said
    assert compare(*results)["validation"].differences["margin"].count == 9


@pytest.mark.slow(seconds=5)
def test_the_loss_of_kto_does_not_depend_on_how_rows_are_evaluated(config, capsys):
    run = config("kto")
    result = train(run)
    found = evaluations(result.workdir)[-1]
    run.eval.batch_size = 2
    run.data.packing = "none"
    evaluated = evaluate(run, result.workdir)
    other = evaluated["validation"].sums
    assert other.loss.value == pytest.approx(found["loss"], rel=1e-5)
    assert other.estimates["kl"].value == pytest.approx(found["kl"], rel=1e-4, abs=1e-6)
    print_evaluation(evaluated, run)
    out = " ".join(capsys.readouterr().out.split())
    assert "loss, per answer" in out and "KL divergence" in out and "preferred" not in out


OBJECTIVE = """
from dataclasses import dataclass
import jax.numpy as jnp
from jaxft.config import key
from jaxft.training.objectives.contract import Objective, Terms

@dataclass(kw_only=True)
class Keys:
    power: float = key(2.0, "Exponent of the nats of a token.", minimum=1)

def rows(policy, batch, keys):
    nats = -policy.scores(batch).log_probs
    count = jnp.sum(batch.weights, axis=-1)
    figures = {"plain_loss": (jnp.sum(nats * batch.weights, axis=-1), count)}
    return Terms(jnp.sum(nats**keys.power * batch.weights, axis=-1), count, figures)

def loss(policy, batch, keys):
    return rows(policy, batch, keys).summed()

OBJECTIVE = Objective(keys=Keys, loss=loss, rows=rows)
"""


@pytest.mark.slow(seconds=7)
def test_an_objective_from_outside_the_package_is_one_file(home, config, tmp_path, monkeypatch):
    (tmp_path / "harsh.py").write_text(OBJECTIVE)
    monkeypatch.chdir(tmp_path)
    run = config("harsh")
    write_chats(tmp_path / "chats.jsonl", 20)
    run.data.train = run.data.validation = str(tmp_path / "chats.jsonl")
    run.objective.harsh.power = 1.0
    result = train(run)
    record = read_records(result.workdir / "metrics.jsonl")[-1]
    assert record["loss"] == pytest.approx(record["plain_loss"])
    assert "plain_loss_low" in evaluations(result.workdir)[-1]
    names = record.keys() | evaluations(result.workdir)[-1].keys()
    values = {name.removesuffix("_low").removesuffix("_high") for name in names}
    assert values - RECORDED == {"plain_loss"}
    values = to_dict(run)
    assert values["objective.harsh.power"] == 1.0
    assert to_dict(from_dict(values)) == values


def test_keys_of_a_module_in_a_package_are_a_group_of_its_last_name(tmp_path, monkeypatch):
    package = tmp_path / "losses"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "dpo.py").write_text(OBJECTIVE)
    monkeypatch.chdir(tmp_path)
    # Of the two of that name the one that is learnt.
    flags = ["--config.objective.dpo.power=3", "--config.objective.name=losses.dpo"]
    config = read_config("", [*flags, "--config.model.path=org/model"])
    values = to_dict(config)
    assert values["objective.dpo.power"] == config.objective.keys.power == 3.0
    assert to_dict(from_dict(values)) == to_dict(copy.deepcopy(config)) == values
    (tmp_path / "run.yaml").write_text(to_yaml(values))
    assert to_dict(read_config(str(tmp_path / "run.yaml"), [])) == values
    with pytest.raises(ConfigError, match=r"losses\.dpo with it, write it objective\.dpo\.power"):
        from_dict({"objective.losses.dpo.power": 3.0})
    config.objective.name = "dpo"
    with pytest.raises(ConfigError, match=r"Set --config\.objective\.name=losses\.dpo"):
        config.validate()
    assert config.objective.dpo.beta == 0.1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rows=rows)", "rows=rows, units='pair')", "units is 'pair'; expected one of 'documents'"),
        ("@dataclass(kw_only=True)", "", "Objective.keys is .*; expected a dataclass"),
        ('key(2.0, "Exponent of the nats of a token.", minimum=1)', "2.0", "power is no key"),
        ("power: float", "power: 'float'", "power has the type 'float'; expected bool, int"),
    ],
)
def test_a_definition_that_cannot_be_used_is_explained(old, new, said, tmp_path, monkeypatch):
    assert old in OBJECTIVE
    name = f"wrong_{''.join(filter(str.isalpha, new))}"
    (tmp_path / f"{name}.py").write_text(OBJECTIVE.replace(old, new))
    monkeypatch.chdir(tmp_path)
    config = RunConfig()
    config.objective.name = name
    with pytest.raises(ConfigError, match=f"'{name}' cannot be used: .*{said}") as error:
        config.validate()
    assert "ConfigError" not in str(error.value)


@pytest.mark.parametrize("figure", ["tokens", "loss", "weight", "plain_high", "perplexity_low"])
def test_a_figure_that_records_have_already_is_refused(figure):
    def judge(policy, batch, keys):
        return Terms(0.0, 1.0, {"plain": (0.0, 1.0), figure: (0.0, 1.0)})

    objective = Objective(keys=sft.Keys, loss=judge, rows=judge)
    bound = BoundObjective(objective=objective, keys=sft.Keys(), chunk=0, name="mine")
    said = f"objective 'mine' names a figure '{figure}', which records have already; rename it"
    for use in (bound.judge, bound.rows):
        with pytest.raises(ConfigError, match=said):
            use(None, None)  # pyright: ignore


def test_a_key_that_no_objective_has_cannot_be_set():
    config = RunConfig()
    with pytest.raises(AttributeError, match="no key 'beta'"):
        config.objective.beta = 0.2


@pytest.mark.parametrize("name", ["reference", "losses.keys", "chunk", "balance", "name", "_own"])
def test_a_module_called_like_another_key_is_refused(name):
    config = RunConfig()
    config.objective.name = name
    with pytest.raises(ConfigError, match=f"'{name}' cannot be used.*Rename the module"):
        config.validate()


def test_keys_of_an_objective_are_understood_or_refused():
    config = RunConfig()
    config.model.path = "org/model"
    config.objective.name = "dpo"
    config.objective.dpo.beta = 0.2
    assert to_dict(config)["objective.dpo.beta"] == 0.2
    assert from_dict(to_dict(config)).objective.dpo.beta == 0.2
    config.objective.name = "sft"
    said = r"objective\.dpo\.beta is set, but objective\.name is 'sft'"
    with pytest.raises(ConfigError, match=said):
        config.validate()
    with pytest.raises(ConfigError, match="would be a key of the objective 'dpo'"):
        from_dict({"objective.dpo.beta": 0.2})
    config.objective.name = "dpoo"
    with pytest.raises(ConfigError, match=r"Unknown objective 'dpoo'.*Did you mean 'dpo'"):
        config.validate()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["name=dpo", "dpo.betta=0.2"],
            "Unknown key '--config.objective.dpo.betta'; dpo has beta, label_smoothing, robust, "
            "normalised. Did you mean '--config.objective.dpo.beta'?",
        ),
        (
            ["name=dpo", "beta=0.2"],
            "Unknown key '--config.objective.beta'. Did you mean '--config.objective.dpo.beta'?",
        ),
        (
            ["dpo.beta=0.2"],
            "--config.objective.dpo.beta would be a key of the objective 'dpo', but objective.name "
            "is 'sft'. Set --config.objective.name=dpo with it, and see its keys with `jaxft train "
            "--print_config --config.objective.name=dpo`.",
        ),
    ],
)
def test_a_misspelt_key_of_an_objective_gets_those_that_there_are(flags, said):
    with pytest.raises(ConfigError) as caught:
        read_config("", [f"--config.objective.{flag}" for flag in flags])
    assert said in caught.value.problems


def test_an_unknown_objective_is_told_once_beside_what_else_is_wrong():
    flags = ["objective.name=DPO", "objective.dpo.beta=1", "train.steps=5", "train.stepz=5"]
    with pytest.raises(ConfigError) as caught:
        read_config("", [f"--config.{flag}" for flag in flags])
    first, second = caught.value.problems
    assert first.startswith("objective.name: Unknown objective 'DPO'; known: sft, ")
    assert first.endswith("Did you mean 'dpo'?")
    assert second.startswith("Unknown key '--config.train.stepz'")


def test_a_file_tells_whose_key_stands_in_the_group_of_another_objective(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("objective:\n  name: dpo\n  dpo: {betta: 1}\n  simpo:\n    gamma: 2\n")
    with pytest.raises(ConfigError) as caught:
        read_config(str(file), [])
    first, second = caught.value.problems
    assert first.startswith(f"{file}:3: Unknown key 'objective.dpo.betta'; dpo has beta, ")
    assert second.startswith(f"{file}:5: objective.simpo.gamma would be a key of the objective ")


@pytest.mark.parametrize("text", ["\n1 / 0\n", "\nx = = 1\n", "import re\nre.compile('(')\n"])
def test_a_broken_module_of_the_users_is_told_with_its_line(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError, match=rf"cannot be used: .*{name}\.py:2: \w+rror: "):
        load_named(name, {}, kind="objective", attribute="OBJECTIVE")


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("dpo", "none", "dpo compares with the weights that training starts from"),
        ("simpo", "fixed", "simpo compares with no other model"),
        ("sft", "cached", "sft compares with no other model"),
    ],
)
def test_a_reference_is_refused_where_it_does_not_belong(name, kind, said):
    config = RunConfig()
    config.model.path = "org/model"
    config.objective.name, config.objective.reference = name, kind
    with pytest.raises(ConfigError, match=said):
        config.validate()


def test_the_digest_of_weights_tells_content_and_not_placement():
    params = load_tiny("gqa").params
    digest = digest_of(params)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = {
        path: jax.device_put(
            value,
            jax.sharding.NamedSharding(
                mesh, jax.sharding.PartitionSpec("x" if value.shape[0] % 8 == 0 else None)
            ),
        )
        for path, value in params.items()
    }
    assert digest_of(placed) == digest
    path, value = next(iter(params.items()))
    flat = np.asarray(value).copy().reshape(-1)
    flat[[0, 1]] = flat[[1, 0]]
    assert digest_of(params | {path: flat.reshape(value.shape)}) != digest


@pytest.mark.slow(seconds=3)
def test_a_run_warns_of_pairs_that_contradict_and_of_prompts_that_are_trained_on(
    home, config, tmp_path, capfd
):
    one, *rest = (home / "train.jsonl").read_text().splitlines()
    row = json.loads(one)
    turned = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    path = tmp_path / "both.jsonl"
    path.write_text("\n".join([one, *rest, json.dumps(turned)]))
    held_out = tmp_path / "known.jsonl"
    held_out.write_text(json.dumps({**row, "chosen": "other"}))
    run = config()
    run.data.train, run.data.validation = str(path), str(held_out)
    train(run)
    said = " ".join(capfd.readouterr().err.split())
    assert "train: 2 of 25 pairs contradict another" in said
    assert "validation: the prompts of 1 of 1 pair are in the training data too" in said

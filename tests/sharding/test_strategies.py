"""Every strategy gives what one device gives, for every family that it can place."""

import dataclasses
import functools
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxft.compiled.collectives import collectives
from jaxft.errors import ConfigError
from jaxft.models.config import DecoderConfig
from jaxft.models.families import architecture_from_hf
from jaxft.sharding.rules import Strategy, load_strategy
from tests.oracle.cases import CASES as CONFIGS
from tests.oracle.cases import FAMILY_CASES
from tests.strategies import BUILT_IN, IN_ONE_STAGE, MESHES, runs
from tests.tiny import Tiny, feed, load_tiny, make_program, random_rows, relative_error, start

STEPS, LENGTH, ROWS = 5, 24, 16
# One model of each family, of the windows and rotary kinds that it has; experts that eight devices
# can share.
CASES = {family: names[0] for family, names in FAMILY_CASES.items()} | {
    "llama": "llama3_rope",
    "qwen2": "qwen2_window",
    "phi3": "phi3_longrope_long",
    "gpt_oss": "gpt_oss_packed",
    "gemma4_text": "gemma4_text_packed",
}
MIXTURES = (
    *("mixtral", "qwen3_moe", "gpt_oss", "gemma4_text", "qwen3_5_moe_text", "qwen3_next"),
    *IN_ONE_STAGE,
)


def families_of(strategy: str) -> list[str]:
    return [f for f in CASES if runs(strategy, f, mixture=f in MIXTURES)]


def turn_of(strategy: str) -> str:
    """The families take turns in the default tests."""
    families = families_of(strategy)
    return families[BUILT_IN.index(strategy) % len(families)]


def is_new(strategy: str) -> bool:
    """Whether no earlier strategy makes the same programs: `hsdp` is `fsdp` but for slices."""
    same = [
        name
        for name in BUILT_IN
        if MESHES[name] == MESHES[strategy]
        and load_strategy(name).rules == load_strategy(strategy).rules
        and load_strategy(name).gradients == load_strategy(strategy).gradients
        and load_strategy(name).moments == load_strategy(strategy).moments
    ]
    return same[0] == strategy


# Of these one family runs in the default suite, or with the long tests.
IN_DEFAULT = ("fsdp",)
IN_LONG = ("zero2", "fsdp_tp_sp", "ep", "zero1", "fsdp_cp", "pp")


def pairs() -> list:
    """Returns all pairs; those of a family run on one worker, which makes the model's own once."""
    found = [
        (strategy, family)
        for family in CASES
        for strategy in BUILT_IN
        if family in families_of(strategy) and (is_new(strategy) or family == turn_of(strategy))
    ]
    turns = [pair for pair in found if pair[1] == turn_of(pair[0])]
    short = [pair for pair in turns if pair[0] in IN_DEFAULT]
    short += [
        pytest.param(*p, marks=pytest.mark.slow(seconds=10)) for p in turns if p[0] in IN_LONG
    ]
    long = [pair for pair in found if pair not in turns or pair[0] not in IN_DEFAULT + IN_LONG]
    return short + [
        pytest.param(*pair, marks=[pytest.mark.matrix(seconds=5), pytest.mark.xdist_group(pair[1])])
        for pair in long
    ]


def mesh_of(strategy: str, model: DecoderConfig) -> dict[str, int]:
    """Returns the mesh of the strategy, with as many devices on an axis as the model has parts."""
    sizes = dict(MESHES[strategy])
    if "stage" in sizes and model.layers % sizes["stage"]:
        # Three or seven layers: a stage for each, and the other devices stay idle.
        sizes = dict.fromkeys(sizes, 1) | {"stage": model.layers, "data": 8 // model.layers}
    while sizes.get("tensor", 1) > 1 and model.heads % sizes["tensor"]:
        sizes |= {"tensor": sizes["tensor"] // 2, "data": sizes["data"] * 2}
    return sizes


def run(tiny: Tiny, devices: int, **changes) -> tuple:
    """Returns final parameters, and loss, norm and trained tokens of each step."""
    program = make_program(
        tiny,
        devices,
        data__max_length=LENGTH,
        train__batch_size=ROWS,
        train__accumulation=2,
        objective__balance=0.1,
        # Adam divides by the size of a gradient: of one that is zero but for rounding it would
        # make a whole step. With a large epsilon the update follows the gradient.
        optim__epsilon=1.0,
        optim__learning_rate=0.1,
        **changes,
    )
    state, records = start(program, tiny.params), []
    for seed in range(STEPS):
        rows = random_rows(ROWS, LENGTH, tiny.architecture.config.vocab, seed=seed)
        state, metrics = program.train_step(state, {}, feed(program, rows))
        records.append((metrics.ratios, metrics.latest, metrics.largest))
    return jax.device_get((state.params, records))


@functools.cache
def load(family: str) -> Tiny:
    return load_tiny(CASES[family])


@functools.cache
def on_one_device(family: str) -> tuple:
    return run(load(family), 1)


@pytest.mark.parametrize(("strategy", "family"), pairs())
def test_five_steps_equal_those_of_one_device(strategy, family):
    """With accumulation, packed rows with padding, and the load-balancing loss of experts."""
    tiny = load(family)
    sizes = mesh_of(strategy, tiny.architecture.config)
    mesh = {f"mesh__{axis}": size for axis, size in sizes.items()}
    devices = int(np.prod(list(sizes.values())))
    params, records = run(tiny, devices, strategy=strategy, **mesh)
    expected_params, expected = on_one_device(family)
    for found, wanted in zip(records, expected, strict=True):
        assert relative_error(found, wanted) < 1e-5
    assert relative_error(params, expected_params) < 1e-5
    assert relative_error(params, jax.device_get(tiny.params)) > 0.01  # they have moved


@pytest.mark.parametrize(
    ("family", "strategy", "changes", "message"),
    [
        ("llama", "ep", {}, "'ep' splits experts over 8 devices and the model has none"),
        ("mixtral", "ep", {}, "cannot shard layers.mlp.gate.w: axis 'experts' has size 4, .* 8"),
        (
            "mixtral",
            "cp",
            {"model__expert_capacity": 1.25},
            "expert_capacity 1.25 counts .* Set --config.model.expert_capacity=0",
        ),
        ("llama", "cp", {}, "rows over 8 devices, .*max_length 24 is not a multiple of 16"),
        (
            "llama",
            "pp",
            {},
            "over 8 stages, .* equal layers, .* has 2 layers. Use a mesh whose stage divides 2,",
        ),
        ("llama", "tp", {}, "axis 'heads' has size 2, mesh axis 'tensor' has size 8"),
        (
            "mistral",
            "fsdp_tp_sp",
            {"mesh__tensor": 4, "data__max_length": 22},
            "cannot shard rows of data.max_length: axis 'stream_seq' has size 22, .* 4",
        ),
        ("llama", "fsdp", {"model__attention": "ring"}, "attention=ring cannot be used"),
    ],
)
def test_pairs_that_cannot_work_are_refused_at_the_start(family, strategy, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_program(load(family), 8, strategy=strategy, **changes)


def test_layers_that_differ_from_the_first_on_are_refused_by_pipelines():
    refused = "over 8 stages, which must have equal layers, .* do not recur in equal groups"
    with pytest.raises(ConfigError, match=refused):
        make_program(load_tiny("deepseek_v3_packed"), 8, strategy="pp")


@pytest.mark.parametrize("strategy", ["pp", "pp_fsdp_tp"])
def test_what_layers_read_beside_the_stream_is_refused_by_pipelines(strategy):
    tiny, config = load_tiny("gemma4_text_e2b"), CONFIGS["gemma4_text_e2b"]
    changes = {"num_kv_shared_layers": 0, "use_double_wide_mlp": False}
    for found, read in (({}, "keys and values of layers before"), (changes, "inputs of their own")):
        model = dataclasses.replace(tiny, architecture=architecture_from_hf(config | found))
        with pytest.raises(ConfigError, match=f"residual stream alone travels.* read {read}"):
            make_program(model, 8, strategy=strategy, mesh__stage=2)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("fsdp_tp_sp", marks=pytest.mark.slow(seconds=15)),
        *(pytest.param(s, marks=pytest.mark.matrix(seconds=15)) for s in ("fsdp_cp", "fsdp_tp")),
    ],
)
def test_what_layers_read_beside_the_stream_equals_that_of_one_device(strategy):
    """Keys and values of layers before, and inputs of each layer's own."""
    tiny = reading()
    mesh = {f"mesh__{axis}": size for axis, size in MESHES[strategy].items()}
    params, records = run(tiny, 8, strategy=strategy, **mesh)
    expected_params, expected = reading_on_one_device()
    for found, wanted in zip(records, expected, strict=True):
        assert relative_error(found, wanted) < 1e-5
    assert relative_error(params, expected_params) < 1e-5


def reading() -> Tiny:
    """With an epsilon by which norms of small numbers do not magnify rounding, twelve times."""
    return load_tiny("gemma4_text_reading", rms_norm_eps=0.1)


@functools.cache
def reading_on_one_device() -> tuple:
    return run(reading(), 1)


@pytest.mark.slow(seconds=7)
def test_a_strategy_from_outside_the_package_is_placed_and_equal(tmp_path, monkeypatch):
    """The one that docs/sharding.md shows, as a reader would write it."""
    page = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "mine.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    tiny = load("mistral")
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    params, records = run(tiny, 8, strategy="theirs.mine", **mesh)
    expected_params, expected = on_one_device("mistral")
    assert relative_error(records, expected) < 1e-5
    assert relative_error(params, expected_params) < 1e-5


THEIRS = {
    "mesh_axes": ("data", "fsdp", "tensor"),
    "fill": "fsdp",
    "rules": {"batch": ("data", "fsdp"), "embed": ("data",)},
}


def run_with(monkeypatch, rules: dict, **changes) -> tuple:
    """Returns the result of a strategy of these rules, beside rows and embeddings."""
    module = types.ModuleType("theirs")
    module.STRATEGY = Strategy(**(THEIRS | {"rules": THEIRS["rules"] | rules}))
    monkeypatch.setitem(sys.modules, "theirs.module", module)
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    return run(load("mistral"), 8, strategy="theirs.module", **mesh, **changes)


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize(
    "rules",
    [
        {"vocab": "fsdp"},
        {"vocab": ("tensor", "fsdp"), "act_vocab": "tensor"},
        {"act_embed": "tensor", "mlp": ("fsdp", "tensor")},
    ],
)
def test_rules_that_a_researcher_may_write_give_the_same_as_one_device(monkeypatch, rules):
    """Tables split over devices with other tokens, and activations split unlike their weights."""
    params, records = run_with(monkeypatch, rules)
    expected_params, expected = on_one_device("mistral")
    assert relative_error(records, expected) < 1e-5
    assert relative_error(params, expected_params) < 1e-5


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"act_vocab": "fsdp"}, r"splits 'act_vocab' over \['fsdp'\], which split rows"),
        (
            {"vocab": ("fsdp", "tensor"), "act_vocab": "tensor"},
            r"'vocab' over \('fsdp', 'tensor'\) and 'act_vocab' over \('tensor',\); name .* first",
        ),
    ],
)
def test_rules_that_cannot_meet_are_refused_at_the_start(monkeypatch, rules, message):
    with pytest.raises(ConfigError, match=message):
        run_with(monkeypatch, rules)


@pytest.mark.slow(seconds=4, but=r"^zero1$")
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_updated_weights_are_gathered_once_a_step(strategy):
    """However many micro-batches there are, and nothing else is gathered."""
    program = make_program(
        load("mistral"), 8, strategy=strategy, train__accumulation=4, train__batch_size=32
    )
    compiled = program.lower().compile()
    placement = program.evaluator.placement
    found = collectives(compiled.as_text(), placement.mesh)
    gathered = sum(one.count * one.bytes for one in found if one.kind == "all-gather")
    moments = placement.shardings(
        program.evaluator.abstract.params,
        program.evaluator.abstract.axes,
        rules=placement.moment_rules,
    )
    split = {path for path, sharding in moments.items() if any(sharding.spec)}
    assert gathered == sum(program.state.trainable[path].size * 4 for path in split)

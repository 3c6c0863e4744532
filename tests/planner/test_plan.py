"""Plans of programs compiled for this machine's CPU devices, against what these programs are."""

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxft import cli
from jaxft.compiled.collectives import collectives, summary
from jaxft.compiled.layout import cpu_devices, make_program
from jaxft.config import RunConfig, to_dict
from jaxft.errors import ConfigError, ModelError
from jaxft.flags import read_config
from jaxft.hardware.chips import Switch, chip_named
from jaxft.models.config import make_numerics
from jaxft.models.families import architecture_from_hf
from jaxft.planner import command
from jaxft.planner.analytic import Estimator
from jaxft.planner.candidates import Search, with_flags
from jaxft.planner.compilation import _key
from jaxft.planner.fits import _smallest
from jaxft.planner.memory import KINDS
from jaxft.planner.placed import Placed
from jaxft.planner.plan import SCHEMA, Plan
from jaxft.planner.planner import Planner, model_flops
from jaxft.planner.prices import read_prices
from jaxft.planner.search import _promising, estimate_all, search
from jaxft.planner.show import print_plans
from jaxft.planner.topology import Topology, parse
from jaxft.training.program import make_placement
from tests.oracle.cases import CASES

LAYERS, EMBED, MLP, HEADS, KEYS, SIZE, VOCAB = 2, 32, 64, 4, 2, 8, 128
LENGTH = 64
MODEL = CASES["gqa"] | {
    "vocab_size": VOCAB,
    "hidden_size": EMBED,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": SIZE,
    "intermediate_size": MLP,
    "tie_word_embeddings": False,
}
TINY = architecture_from_hf(MODEL)


def run(**changes: Any) -> RunConfig:
    config = RunConfig()
    config.model.path, config.model.dtypes = "tiny", "float32"
    config.model.remat = "none"
    config.data.max_length, config.train.batch_size = LENGTH, 16
    config.objective.chunk = 16
    for key, value in changes.items():
        group, _, leaf = key.rpartition("__")
        setattr(getattr(config, group) if group else config, leaf, value)
    return config


# This machine's devices, with the figures of a chip that has some: a search ranks by time.
LOCAL = dataclasses.replace(parse("local"), chip=chip_named("h100"))  # pyright: ignore


def planner() -> Planner:
    return Planner(architecture=TINY, prices=read_prices(), cache="off")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planner().plan(run(), parse("local"), evaluation=True)


@pytest.fixture(scope="module")
def compiled() -> Any:
    config = run()
    program = make_program(config, TINY, placement=make_placement(config))
    return program.compile()


@pytest.mark.slow(seconds=2)
def test_memory_is_the_compilers(plan, compiled):
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    assert plan.memory.used == pytest.approx(held, rel=1e-3)
    assert sum(plan.memory.kinds.values()) == plan.memory.used
    assert set(plan.memory.kinds) == set(KINDS)


def test_state_is_what_its_arrays_take(plan):
    per_layer = EMBED * SIZE * (2 * HEADS + 2 * KEYS) + 3 * EMBED * MLP + 2 * EMBED
    count = LAYERS * per_layer + 2 * VOCAB * EMBED + EMBED
    assert plan.parameters == count
    norms = (2 * LAYERS + 1) * EMBED  # whole on each of eight devices
    held = 4 * ((count - norms) // 8 + norms)
    assert plan.memory.kinds["parameters"] == held
    assert plan.memory.kinds["optimizer"] == pytest.approx(2 * held, abs=64)


def test_flops_that_run_are_those_of_every_matrix_product(plan):
    """Without rematerialisation: thrice the forward pass."""
    tokens = 16 * LENGTH // 8
    weights = EMBED * SIZE * (2 * HEADS + 2 * KEYS) + 3 * EMBED * MLP
    scores = 2 * LENGTH * HEADS * SIZE  # XLA's attention scores the pairs that are hidden, too
    exact = 2 * tokens * (LAYERS * 3 * (weights + scores) + 3 * VOCAB * EMBED)
    assert plan.work.flops == pytest.approx(exact, rel=1e-6)


def test_flops_that_are_needed_count_pairs_that_see_each_other(plan):
    tokens = 16 * LENGTH
    weights = LAYERS * (EMBED * SIZE * (2 * HEADS + 2 * KEYS) + 3 * EMBED * MLP + 2 * EMBED)
    multiplied = weights + EMBED + VOCAB * EMBED
    attention = 12 * LAYERS * LENGTH * HEADS * SIZE
    assert plan.work.model_flops_full == pytest.approx(
        tokens * (6 * multiplied + attention) / 8, rel=1e-6
    )
    assert plan.work.model_flops == pytest.approx(
        tokens * (6 * multiplied + attention / 2) / 8, rel=1e-6
    )


def twice_visible_pairs(window: int) -> int:
    """Twice the pairs of a row that see each other, less its tokens; counted one by one."""
    return sum(2 * min(query + 1, window or LENGTH) - 1 for query in range(LENGTH))


@pytest.mark.parametrize(
    ("case", "windows"),
    [
        ("gqa", [0, 0]),
        ("mistral_window", [7, 7]),
        ("qwen2_layer_types", [6, 0]),
        ("gemma3_text_gqa", [6, 6, 6, 6, 6, 0, 6]),
    ],
)
def test_windows_take_from_attention_what_they_hide(case, windows):
    architecture = architecture_from_hf(CASES[case])
    causal, full = model_flops(run(), 0, architecture)
    model = architecture.config
    assert model.layers == len(windows)
    pairs = 16 * sum(map(twice_visible_pairs, windows))
    assert full == pytest.approx(12 * model.heads * model.head_dim * pairs)
    assert causal == full / 2


def test_a_plan_counts_windows_in_what_is_needed_and_says_what_they_cost():
    def estimate(window: int | None) -> Plan:
        config = CASES["mistral_window"] | {"sliding_window": window}
        planner = Planner(architecture=architecture_from_hf(config), prices=read_prices())
        return planner.estimate(run(model__dtypes="mixed"), parse("h100:8"))

    windowed, whole = estimate(7), estimate(None)
    hidden = twice_visible_pairs(0) - twice_visible_pairs(7)
    saved = 12 * (16 / 8) * 2 * 4 * 8 * hidden  # rows of a device, layers, heads, size
    assert whole.work.model_flops_full - windowed.work.model_flops_full == saved
    # cuDNN has no windows: all pairs are scored, and the plan says so.
    assert windowed.work.flops > whole.work.flops
    assert any("window of [7]" in note for note in windowed.notes)
    assert any("cudnn" in note for note in whole.notes)


def test_exchanges_are_the_collectives_of_the_program(plan, compiled):
    mesh = make_placement(run()).mesh
    totals = summary(collectives(compiled.as_text(), mesh))
    expected = {(t.kind, t.axes): (t.count, t.bytes, t.wire_bytes) for t in totals}
    found = {(e.kind, e.axes): (e.count, e.bytes, e.wire_bytes) for e in plan.exchanges}
    assert found == expected


def test_the_eval_step_is_planned_too(plan):
    assert 0 < plan.evaluation_memory < plan.memory.used
    known = planner().plan(run(), LOCAL, evaluation=True)
    assert known.time is not None and known.evaluation is not None
    assert 0 < known.evaluation.seconds < known.time.seconds


def test_unknown_devices_have_no_time_and_say_so(plan):
    assert plan.time is plan.speed is plan.timeline is None
    assert plan.fits
    assert any("No figures" in note for note in plan.notes)


def test_the_record_is_json_and_names_its_version(plan):
    record = json.loads(json.dumps(plan.record()))
    assert record["schema"] == SCHEMA
    assert record["settings"]["data.max_length"] == LENGTH
    assert record["topology"]["devices"] == 8
    assert record["memory"]["kinds"] == plan.memory.kinds
    assert "timeline" not in record


@pytest.mark.slow(seconds=3)
def test_a_plan_is_found_again_without_compiling(tmp_path, monkeypatch):
    cached = Planner(architecture=TINY, prices=read_prices(), cache=str(tmp_path))
    first = cached.plan(run(), parse("local"))
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert cached.plan(run(), parse("local")).record() == first.record()
    monkeypatch.undo()
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])  # as a full disk leaves it
    assert cached.plan(run(), parse("local")).memory == first.memory


def test_another_program_option_flag_or_target_is_kept_apart(monkeypatch):
    def lowered(size: int):
        return jax.jit(lambda x: x * 2).lower(jax.ShapeDtypeStruct((size,), np.float32))

    keys = [_key(lowered(3), {}, "a"), _key(lowered(3), {}, "a"), _key(lowered(4), {}, "a")]
    keys += [_key(lowered(3), {"xla_a": "1"}, "a"), _key(lowered(3), {}, "b")]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_a=1")
    keys.append(_key(lowered(3), {}, "a"))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


def test_a_run_that_would_be_refused_is_refused():
    with pytest.raises(ConfigError, match="cannot be split"):
        planner().plan(run(train__batch_size=12), parse("local"))
    with pytest.raises(ConfigError, match="No such compile option"):
        planner().plan(run(train__compiler_options="xla_no_such_thing=1"), parse("local"))


def test_a_run_whose_evaluation_does_not_fit_does_not_fit(plan):
    memory = dataclasses.replace(plan.memory, limit=4 * plan.memory.used)
    assert dataclasses.replace(plan, memory=memory).fits
    large = memory.limit - memory.kinds["optimizer"] + 1
    assert not dataclasses.replace(plan, memory=memory, evaluation_memory=large).fits


def test_a_run_that_needs_more_of_the_host_than_there_is_does_not_fit(plan):
    memory = dataclasses.replace(plan.memory, host=2 << 30, host_limit=1 << 30)
    assert not dataclasses.replace(plan, memory=memory).fits


# Search.


@pytest.mark.slow(seconds=4)
def test_candidates_fill_the_slice_and_are_all_different():
    found = estimate_all(run(), LOCAL, planner())
    assert len(found) > 100
    for candidate in found:
        sizes = [v for key, v in candidate.flags.items() if key.startswith("mesh.")]
        assert math.prod(sizes) == 8
    effects = [json.dumps(candidate.flags, sort_keys=True) for candidate in found]
    assert len(set(effects)) == len(effects)


@pytest.mark.slow(seconds=3)
def test_no_candidate_is_another_by_another_name():
    """`fsdp_tp` with one device on `tensor` is `fsdp`, `hsdp` on one slice is `fsdp`."""
    found = estimate_all(run(), LOCAL, planner())
    whole = [
        c.flags["strategy"]
        for c in found
        if c.flags.get("mesh.fsdp") == 8 and c.flags["train.accumulation"] == 1
    ]
    assert len(set(whole)) == 1


def test_the_rows_of_a_step_stay_what_they_are():
    for candidate in estimate_all(run(), LOCAL, planner(), names=["fsdp"]):
        changed = with_flags(run(), candidate.flags)
        assert changed.train.batch_size == 16
        assert changed.data.max_length == LENGTH


@pytest.fixture(scope="module")
def found() -> Search:
    return search(run(), LOCAL, planner(), names=["fsdp", "ddp"], count=2)


@pytest.mark.slow(seconds=2)
def test_the_best_of_each_strategy_is_compiled_first():
    hopeful = estimate_all(run(), LOCAL, planner())
    order = _promising(hopeful)
    assert sorted(map(id, order)) == sorted(map(id, hopeful))
    close = [c for c in hopeful if c.estimate_seconds <= 1.5 * hopeful[0].estimate_seconds]
    expected = {c.flags["strategy"] for c in close if not c.flags["model.offload"]}
    assert {c.flags["strategy"] for c in order[: len(expected)]} == expected


@pytest.mark.slow(seconds=3)
def test_a_search_compiles_and_ranks(found):
    done = [c for c in found.candidates if c.plan is not None]
    assert found.compiled == len(done) == 2
    assert found.best is found.candidates[0]
    assert all(c.outcome for c in found.candidates)


@pytest.mark.parametrize("name", ["best.py", "best.yaml"])
def test_the_best_is_written_as_a_config_that_runs(found, tmp_path, name):
    file = command.write_config(str(tmp_path / name), run(), found)
    best = found.best
    assert best is not None
    assert to_dict(read_config(str(file), [])) == to_dict(with_flags(run(), best.flags))
    assert best.name in file.read_text()


def test_why_nothing_can_be_tried_is_said():
    with pytest.raises(ConfigError, match="cannot be split"):
        search(run(train__batch_size=3), LOCAL, planner(), names=["ddp"])


def test_a_search_needs_figures_to_rank_by():
    with pytest.raises(ConfigError, match="no figures of 'cpu'"):
        search(run(), parse("local"), planner())


# The command.


@pytest.fixture
def folder(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return str(tmp_path)


def plan_command(folder: str, *more: str) -> int:
    keys = [
        f"--config.model.path={folder}",
        f"--config.data.max_length={LENGTH}",
        "--config.train.batch_size=16",
    ]
    return cli.main(["plan", *keys, "--cache=off", *more])


def test_the_command_prints_facts_and_estimates(folder, tmp_path, capsys):
    file = tmp_path / "plan.json"
    page = tmp_path / "plan.html"
    more = [f"--json={file}", f"--html={page}"]
    assert plan_command(folder, "--topology=local", *more) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed
    assert "all-gather" in printed
    assert json.loads(file.read_text())["plans"][0]["model"] == folder
    assert page.read_text().lower().startswith("<!doctype html>")


def test_attention_that_a_gpu_cannot_have_is_refused_or_held_whole():
    config = run(model__dtypes="mixed", model__attention="splash")
    with pytest.raises(ConfigError, match="it runs on TPUs"):
        planner().estimate(config, parse("h100:8"))
    config.model.attention = "auto"
    new, old = (planner().estimate(config, parse(name)) for name in ("h100:8", "a100:8"))
    assert any("cudnn" in note for note in new.notes)
    assert any("xla" in note and "9.0" in note for note in old.notes)
    # Scores and their gradient in float32, weights of values, and which scores are hidden.
    scores = 16 * LENGTH // 8 * HEADS * LENGTH * (4 + 4 + 2 + 1)
    difference = old.memory.kinds["temporaries"] - new.memory.kinds["temporaries"]
    assert difference == scores


def test_gpus_that_are_not_there_are_searched_by_estimate(folder, tmp_path, capsys):
    file = tmp_path / "best.py"
    more = ["--strategy=fsdp,ddp", "--count=3", f"--output={file}"]
    assert plan_command(folder, "--topology=h100:8", "--search", *more) == 0
    printed = capsys.readouterr().out
    assert "3 planned by estimate" in printed
    assert read_config(str(file), []).train.batch_size == 16


def test_a_strategy_keeps_the_sizes_of_the_axes_that_it_has(folder, tmp_path):
    file = tmp_path / "plan.json"
    sizes = ["--config.mesh.fsdp=2", "--config.mesh.data=4"]
    arguments = ["--topology=h100:8", "--strategy=hsdp", *sizes, f"--json={file}"]
    assert plan_command(folder, *arguments) == 0
    [found] = json.loads(file.read_text())["plans"]
    assert found["mesh"] == {"data": 4, "fsdp": 2}


def test_gpus_that_are_not_there_are_estimated_and_labelled(folder, capsys):
    assert plan_command(folder, "--topology=h100:8", "--strategy=fsdp,ddp") == 0
    printed = capsys.readouterr().out
    assert printed.count("by estimate") == 2
    assert "nothing was compiled" in printed
    assert "nothing was compiled" in printed
    assert "USD" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--topology=v5e:4x4"),
        (["--topology=v9e-8"], "no chip 'v9e' is known"),
        (["--topology=v5e-12,v6e-3"], "no slice of 3 chips"),
        (["--topology=local", "--output=best.py"], "add --search"),
        (["--topology=local", "--budget=60"], "--budget is for a search; add --search"),
        (["--topology=local,h100:8"], "plan it by itself"),
        (["--topology=h100:8,h100:4", "--search", "--output=best.py"], "name one --topology"),
        (["--topology=h100:8", "--search", "--jobs=-1"], "--jobs 0 or more"),
        (["--topology=local", "--strategy=fdsp"], "Did you mean 'fsdp'?"),
        (["--topology=local", "--config.strategy=fdsp"], "Did you mean 'fsdp'?"),
        (["--topology=h100:8", "--search", "--output=best.txt"], "ends in .py, .yaml or .yml"),
        (["--topology=local", "--prices=none.toml"], "none.toml cannot be read"),
        (["--topology=local", "--config.mesh.tensor=3"], "has no axis 'tensor'"),
        (["--topology=local", "--config.mesh.fsdp=3"], "does not fit 8 devices"),
        (["--topology=local", "--config.model.remat=qvk"], "Did you mean 'qkv'?"),
        (["--topology=local", "--html=no/such/plan.html"], "there is no folder"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(folder, capsys, arguments, said):
    assert plan_command(folder, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy=fsdp,misspelt"], "Unknown strategy 'misspelt'"),
        (["--strategy=fsdp", "--strategy=fdsp,ddpp"], "'ddpp'"),
        (["--strategy=fsdp_tp,fsdp", "--config.mesh.tensor=2"], "'fsdp' has no axis 'tensor'"),
        (["--strategy=ddp", "--config.mesh.fsdp=2"], "'ddp' has no axis 'fsdp'"),
    ],
)
def test_every_strategy_is_checked_before_any_is_planned(folder, capsys, arguments, said):
    assert plan_command(folder, "--topology=h100:8", *arguments) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Estimating" not in printed


def test_all_unknown_slices_are_named_at_once(folder, capsys):
    plan_command(folder, "--topology=v5e-12", "--topology=v9e-8")
    said = capsys.readouterr().err
    assert "v5e-12" in said
    assert "v9e-8" in said


def test_a_search_where_scores_are_held_whole_finds_what_fits(folder):
    config, topology = run(), parse("a100:8")
    found = estimate_all(config, topology, planner(), names=["fsdp"])
    least = min(c.estimate_bytes for c in found if c.estimate)
    assert least < found[0].estimate_bytes  # which is the fastest
    chip = dataclasses.replace(topology.chip, usable=least)
    narrow = dataclasses.replace(topology, chip=chip)
    best = search(config, narrow, planner(), names=["fsdp"], count=1).best
    assert best is not None and best.plan is not None
    assert best.plan.memory.used == best.estimate_bytes == least


def test_the_eval_step_of_gpus_is_estimated_and_may_not_fit():
    config = run()
    few = planner().estimate(config, parse("h100:8"), evaluation=True)
    assert few.fits and few.evaluation is not None and few.time is not None
    assert few.evaluation.seconds < few.time.seconds / 2
    config.eval.batch_size = 80_000_000
    many = planner().estimate(config, parse("h100:8"), evaluation=True)
    assert many.memory.fits and not many.fits


def test_gpus_of_several_machines_are_joined_by_the_slow_network():
    def networks(count: int) -> set[str]:
        devices = cpu_devices(8)[:8]
        chip = chip_named("h100")
        assert chip is not None
        domain = dataclasses.replace(chip, network=Switch(size=count, link=450e9))
        topology = Topology("h100:8", domain, (8,))
        config = run(strategy="fsdp")
        placement = make_placement(config, devices)
        abstract = TINY.abstract(make_numerics(config.model.dtypes))
        estimator = Estimator(architecture=TINY, topology=topology)
        found = estimator.estimate(config, Placed(placement, abstract, LENGTH))
        return {one.network for one in found.exchanges}

    assert networks(8) == {"ici"}
    assert networks(4) == {"dcn"}


def test_a_gpu_run_that_does_not_fit_is_told_what_would(folder, capsys):
    rows = ["--config.train.batch_size=40000000", "--no_eval", "--config.model.remat=none"]
    assert plan_command(folder, "--topology=h100:8", "--strategy=fsdp", *rows) == 1
    printed = capsys.readouterr().out
    assert "What was estimated to see whether it would fit" in printed
    assert "keep the layers' inputs alone" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--topology="], "Name one or more slices"),
        (["--topology=h100:8", "--budget=nan", "--search"], "--budget more than 0 seconds"),
        (["--topology=h100:8", "--json=same", "--html=same"], "one would replace the other"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(folder, capsys, options, said):
    assert plan_command(folder, *options) == 2
    assert said in capsys.readouterr().err


def test_names_are_printed_as_they_are(capsys):
    config = run()
    config.model.path = "models/[red]m[/x]"
    print_plans([planner().estimate(config, parse("h100:8"))])
    assert "models/[red]m[/x]: " in capsys.readouterr().out


def test_more_devices_are_made_up_only_where_they_are_needed(monkeypatch):
    counts: list[int] = []
    monkeypatch.setattr(command, "cpu_devices", counts.append)
    for topologies in (["local"], ["h100:16"]):
        for remedies in (True, False):
            request = command.Request(topologies=topologies, remedies=remedies)
            with pytest.raises(ModelError):  # there is none; devices come first
                command.plan(run(model__path="/nowhere"), request)
    assert counts == [32, 16]


def test_mfu_counts_what_learns():
    config = run(optim__freeze="layers|embed")
    found = planner().estimate(config, parse("h100:8"))
    tokens = 16 * LENGTH // 8
    weights = LAYERS * (EMBED * SIZE * (2 * HEADS + 2 * KEYS) + 3 * EMBED * MLP + 2 * EMBED)
    head = VOCAB * EMBED
    exact = 2 * tokens * (weights + EMBED + 2 * head + head + EMBED)
    exact += 4 * LAYERS * HEADS * SIZE * tokens * LENGTH / 2
    assert found.work.model_flops == pytest.approx(exact, rel=0.01)


def test_an_eval_step_that_does_not_fit_is_said_on_the_page_and_not_mended(folder, tmp_path):
    file = tmp_path / "plan.html"
    rows = ["--config.eval.batch_size=80000000", f"--html={file}", "--strategy=fsdp"]
    assert plan_command(folder, "--topology=h100:8", *rows) == 1
    page = file.read_text()
    assert "on a device and does not fit" in page
    assert "What would make it fit" not in page


@pytest.mark.slow(seconds=4)
def test_the_smallest_slices_are_listed_for_each_way_to_tune(folder, tmp_path, capsys):
    chips = ["--chip=h100", "--chip=l4"]
    keys = ["--config.data.max_length=64", "--config.train.batch_size=8", "--config.adapter.rank=4"]
    assert cli.main(["plan", f"--fit={folder}", *chips, *keys, f"--json={tmp_path / 'f'}"]) == 0
    printed = capsys.readouterr().out
    assert "none was compiled" in printed and "h100:1" in printed
    found = json.loads((tmp_path / "f").read_text())["fits"]
    assert [fit["method"] for fit in found] == [m for m in ("full", "LoRA", "QLoRA") for _ in "12"]
    assert [fit["chip"] for fit in found][::2] == ["h100"] * 3  # as l4 has no price
    full, low, quantised = (fit["plan"] for fit in found[::2])
    assert full["trained"] == full["parameters"] > low["trained"] > 0
    memory = [plan["memory"]["kinds"]["parameters"] for plan in (full, low, quantised)]
    assert memory[2] < memory[1] < memory[0]
    prices = [plan["speed"]["price_per_million_tokens"] for plan in (full, low)]
    assert prices[1] < prices[0]
    assert cli.main(["plan", f"--fit={folder}", "--chip=h100x"]) == 2
    assert "Did you mean 'h100'?" in capsys.readouterr().err


@pytest.mark.slow(seconds=2)
def test_a_smaller_slice_than_the_smallest_does_not_fit():
    config, chip = run(train__batch_size=8), parse("h100:1").chip
    fewest = [
        min(c.estimate_bytes for c in _of(config, n) if c.estimate and not c.flags["model.offload"])
        for n in (1, 2)
    ]
    narrow = dataclasses.replace(chip, usable=fewest[1])
    assert fewest[1] < fewest[0]
    found = _smallest("full", config, narrow, planner())
    assert found.plan is not None and found.plan.topology.chips == 2
    assert found.plan.memory.used <= fewest[1]


def _of(config: RunConfig, count: int) -> list[Any]:
    return estimate_all(config, parse(f"h100:{count}"), planner(), names=["fsdp"])

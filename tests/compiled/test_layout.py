"""What `jaxft shardings` says, against arrays that are really placed; its page and its errors."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxft import cli, console
from jaxft.compiled.layout import (
    Description,
    check_outputs,
    cpu_devices,
    describe,
    describe_run,
    make_program,
)
from jaxft.compiled.layout_page import write_page
from jaxft.config import RunConfig
from jaxft.errors import ConfigError, ModelError
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.sharding.rules import Placement, load_strategy
from jaxft.training.optim import make_optimizer, make_schedule
from jaxft.training.program import make_placement
from jaxft.training.state import init_state
from tests.oracle.cases import CASES
from tests.write_golden import MODELS, config_of

TINY = architecture_from_hf(CASES["gqa"])


class FakeDevice:
    """A device of which nothing but its number matters."""

    def __init__(self, number: int):
        self.id = number
        self.platform = self.device_kind = "cpu"
        self.process_index = 0
        self.client = SimpleNamespace(process_index=lambda: 0)


def placement_of(strategy: str, **sizes: int) -> Placement:
    """A placement on devices that are not there."""
    count = int(np.prod(list(sizes.values())))
    devices = np.array([FakeDevice(i) for i in range(count)]).reshape(tuple(sizes.values()))
    return Placement(strategy, load_strategy(strategy), Mesh(devices, tuple(sizes)))


def described(
    config: RunConfig, architecture: Architecture, *, placement: Placement
) -> Description:
    """Describes the run's program, with a row for each device."""
    train = dataclasses.replace(config.train, batch_size=2 * placement.mesh.size)
    config = dataclasses.replace(config, train=train)
    return describe(make_program(config, architecture, placement=placement), model="tiny")


def folder_of(tmp_path: Path, config: dict) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("strategy", ["zero2", "fsdp_tp", "fsdp_cp"])
def test_bytes_and_copies_are_those_of_arrays_on_devices(strategy):
    config = config_of(strategy)
    placement = make_placement(config)
    found = described(config, TINY, placement=placement)
    abstract = TINY.abstract(make_numerics("mixed"))
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, 1), abstract)
    zeros = {path: np.zeros(spec.shape, np.float32) for path, spec in abstract.params.items()}
    state = init_state(zeros, optimizer, "")
    first = placement.mesh.devices.flat[0]

    def held(tree, rules) -> int:
        """Places every array by its path and counts the bytes on the first device."""
        shardings = placement.shardings(abstract.params, abstract.axes, rules=rules)
        total = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = getattr(path[-1], "key", "")
            array = jax.device_put(leaf, shardings.get(name, placement.replicated))
            [shard] = [s for s in array.addressable_shards if s.device == first]
            total += shard.data.nbytes
        return total

    assert found.bytes_per_device == {
        "parameters": held(zeros, None),
        "gradients": held(zeros, placement.gradient_rules),
        "optimizer": held(state.opt_state, placement.moment_rules),
    }
    for parameter in found.parameters:
        sharding = placement.shardings(abstract.params, abstract.axes)[parameter.path]
        indices = sharding.devices_indices_map(parameter.value.shape).values()
        assert parameter.value.copies == 8 / len({str(index) for index in indices})


def test_what_is_frozen_has_neither_gradient_nor_moments():
    config = config_of("fsdp")
    config.optim.freeze = "embed"
    found = described(config, TINY, placement=make_placement(config))
    [frozen] = [p for p in found.parameters if p.path == "embed.w"]
    assert frozen.gradient is None and frozen.moments == ()
    trained = [p for p in found.parameters if p is not frozen]
    assert all(p.gradient is not None and len(p.moments) == 2 for p in trained)
    parts = found.bytes_per_device
    assert parts["gradients"] == parts["parameters"] - frozen.value.bytes_per_device


def test_sums_over_micro_batches_are_float32():
    config = config_of("ddp")
    config.model.dtypes = "bfloat16"
    placement = make_placement(config)
    once = described(config, TINY, placement=placement).bytes_per_device
    config.train.accumulation = 2
    twice = described(config, TINY, placement=placement).bytes_per_device
    assert once["gradients"] == once["parameters"] == twice["parameters"]
    assert twice["gradients"] == 2 * once["gradients"]


def test_large_arrays_that_every_device_holds_whole_are_giants():
    llama = architecture_from_hf(MODELS["llama_8b"])
    config = RunConfig()
    whole = described(config, llama, placement=placement_of("ddp", data=64))
    assert {p.path for p in whole.giants} == {
        p.path for p in whole.parameters if not p.path.endswith("scale")
    }
    split = described(config, llama, placement=placement_of("fsdp", data=1, fsdp=64))
    assert split.giants == ()
    # Its moments are split, but the parameter is whole.
    part = described(config, llama, placement=placement_of("zero1", data=64))
    assert len(part.giants) == len(whole.giants)
    alone = described(config, llama, placement=placement_of("ddp", data=1))
    assert alone.giants == ()


def test_the_command_prints_and_writes_the_description(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console.stdout, "width", 120)
    folder = folder_of(tmp_path, CASES["gqa"])
    arguments = ["shardings", f"--config.model.path={folder}", "--config.strategy=fsdp_tp"]
    arguments += ["--config.mesh.tensor=2", "--config.data.max_length=16", "--devices=8"]
    arguments += ["--collectives", f"--html={tmp_path}/a.html", f"--output={tmp_path}/a.json"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "under fsdp_tp on data=1 x fsdp=4 x tensor=2" in printed
    for file in ("a.html", "a.json"):
        assert f"Wrote {tmp_path}/{file}." in printed
    assert re.search(
        r"layers\.mlp\.up\.w +2x48x32 +float32 +\(-, tensor, fsdp\) +1\.5 KiB +1", printed
    )
    assert re.search(r"all-reduce +tensor +\d+ +\S+ KiB", printed)
    assert "as the compiler for cpu wrote it" in printed
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert written["bytes_per_device"]["parameters"] > 0
    assert {total["kind"] for total in written["communication"]["totals"]} >= {"all-reduce"}
    assert "Exchange in one training step" in (tmp_path / "a.html").read_text()


def test_a_laptop_shows_hundreds_of_devices(tmp_path):
    folder = folder_of(tmp_path, MODELS["llama_8b"])
    command = [sys.executable, "-m", "jaxft", "shardings", f"--config.model.path={folder}"]
    command.append("--config.train.batch_size=256")
    environment = os.environ | {"COLUMNS": "120"}
    environment.pop("XLA_FLAGS", None)
    run = subprocess.run(
        [*command, "--devices=256"], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "8,030,261,248 parameters under fsdp on data=1 x fsdp=256" in run.stdout
    assert re.search(r"head\.w +128256x4096 +float32 +\(-, fsdp\) +7\.83 MiB +1\n", run.stdout)


def test_what_cannot_be_shown_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match="--devices is 0; expected at least 1"):
        cpu_devices(0)
    with pytest.raises(ConfigError, match="is 1000, but jax has started with 8 CPU devices"):
        cpu_devices(1000)
    config = RunConfig()
    config.model.path = str(tmp_path / "nothing")
    with pytest.raises(ModelError, match="nothing"):
        describe_run(config)
    config.strategy = "fsdq"
    with pytest.raises(ConfigError, match="Did you mean 'fsdp'"):
        describe_run(config)
    config = RunConfig(strategy="fsdp")
    config.mesh.data = 3
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        describe_run(config)
    config = config_of("fsdp")
    config.train.batch_size = 4
    with pytest.raises(ConfigError, match="cannot be split over 8 devices"):
        make_program(config, TINY, placement=make_placement(config))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.strategy=ep", "--config.mesh.expert=2"], "the model has none"),
        (["--config.train.batch_size=4"], "cannot be split over 8 devices"),
        (["--config.strategy=cp", "--config.data.max_length=100"], "100"),
        (["--devices=0"], "--devices is 0; expected at least 1"),
        (["--config.model.remat=auto", "--collectives"], "such as --config.model.remat=full"),
    ],
)
def test_no_layout_is_shown_of_a_run_that_the_trainer_refuses(flags, said, tmp_path, capsys):
    folder = folder_of(tmp_path, CASES["gqa"])
    arguments = ["shardings", f"--config.model.path={folder}", "--devices=8", *flags]
    assert cli.main(arguments) == ConfigError.exit_code
    shown = capsys.readouterr()
    assert said in shown.err and "a device" not in shown.out


@pytest.mark.parametrize(
    "key", ["model.attention=splash", "optim.warmup_steps=50", "model.remat=auto"]
)
def test_a_run_meant_for_other_devices_is_shown(key, tmp_path, capsys):
    folder = folder_of(tmp_path, CASES["gqa"])
    arguments = ["shardings", f"--config.model.path={folder}", f"--config.{key}", "--devices=8"]
    assert cli.main(arguments) == 0
    assert "Each device holds" in capsys.readouterr().out


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, capsys):
    arguments = ["shardings", "--config.model.path=/nothing/there", f"--output={tmp_path}"]
    assert cli.main([*arguments, f"--html={tmp_path}/no/x.html"]) == ConfigError.exit_code
    first, second = capsys.readouterr().err.splitlines()
    assert f"--html={tmp_path}/no/x.html: there is no folder {tmp_path}/no." in first
    assert f"--output={tmp_path} is a folder" in second
    check_outputs(html="", output=str(tmp_path / "new.json"))


def test_names_of_parameters_are_not_cut_where_there_is_little_room(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console.stdout, "width", 60)
    folder = folder_of(tmp_path, CASES["gqa"])
    assert cli.main(["shardings", f"--config.model.path={folder}", "--devices=8"]) == 0
    assert "layers.mlp_norm.scale " in capsys.readouterr().out


def articles(page: str) -> dict[str, str]:
    """Returns the cards of a page by the first path that each names."""
    cards = re.findall(r"<article.*?</article>", page, re.DOTALL)
    return {re.findall(r"<code>(.*?)</code>", card)[0]: card for card in cards}


def numbers(text: str) -> list[int]:
    """Reads `devices 0–3, 8`."""
    found = []
    for first, last in re.findall(r"(\d+)(?:–(\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return found


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_tp", "pp_fsdp_tp"])
def test_every_drawn_block_names_the_devices_that_hold_it(tmp_path, strategy):
    config = config_of(strategy)
    placement = make_placement(config)
    found = described(config, TINY, placement=placement)
    page = write_page(str(tmp_path / "page.html"), found).read_text()
    cards = articles(page)
    abstract = TINY.abstract(make_numerics("mixed"))
    shardings = placement.shardings(abstract.params, abstract.axes)
    for path in ("layers.attn.o.w", "layers.mlp.down.w", "layers.attn_norm.scale"):
        shape, axes = abstract.params[path].shape, abstract.axes[path]
        expected: dict[tuple, set[int]] = {}
        for device, index in shardings[path].devices_indices_map(shape).items():
            block = tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
            expected.setdefault(block, set()).add(device.id)
        drawn = {}
        for ranges, devices in re.findall(r"<title>(.*?)\n(.*?)</title>", cards[path]):
            named = dict(part.rsplit(" ", 1) for part in ranges.split(", "))
            block = tuple(
                tuple(map(int, named.get(axis, f"0:{size}").split(":")))
                for axis, size in zip(axes, shape, strict=True)
            )
            drawn[block] = set(numbers(devices))
        assert drawn == expected


def test_a_page_of_many_devices_is_small_and_says_what_it_leaves_out(tmp_path):
    architecture = architecture_from_hf(MODELS["qwen3_30b_a3b"])
    placement = placement_of("fsdp_ep", data=1, fsdp=64, expert=8)
    found = described(RunConfig(), architecture, placement=placement)
    page = write_page(str(tmp_path / "page.html"), found).read_text()
    assert len(page) < 400_000
    card = articles(page)["layers.mlp.down.w"]
    assert "11 of 64 blocks along embed drawn" in card and "× 48 layers" in card
    assert card.count('<rect class="b"') == 8 * 11
    assert page.count("<title>device ") == 512


def test_a_page_needs_nothing_else_and_shows_giants_in_red(tmp_path):
    llama = architecture_from_hf(MODELS["llama_8b"])
    red = {}
    for strategy, sizes in (("ddp", {"data": 8}), ("fsdp", {"data": 1, "fsdp": 8})):
        found = described(RunConfig(), llama, placement=placement_of(strategy, **sizes))
        page = write_page(str(tmp_path / "page.html"), found).read_text()
        assert not re.search(r"https?://|<link|<img|src=|@import|url\(", page)
        red[strategy] = page.count('<figure class="giant">'), page.count('<tr class="giant">')
    assert red == {"ddp": (6, 9), "fsdp": (0, 0)}


def test_names_cannot_break_a_page(tmp_path):
    found = described(RunConfig(), TINY, placement=placement_of("fsdp", data=1, fsdp=8))
    bad = "<script>alert(1)</script>"
    first = dataclasses.replace(found.parameters[0], path=bad)
    parameters = (first, *found.parameters[1:])
    found = dataclasses.replace(found, model=bad, strategy=bad, parameters=parameters)
    page = write_page(str(tmp_path / "page.html"), found).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4

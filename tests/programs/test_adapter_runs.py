"""Runs that learn an adapter: resumed bit for bit, with checkpoints that hold it alone."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.cli.common import export_command
from jaxft.config import AdapterConfig
from jaxft.errors import CheckpointError, DataError
from jaxft.programs.trainer import train
from jaxft.training.adaptation import adapted
from jaxft.workdir.adapter_note import AdapterNote, read_note
from jaxft.workdir.source import Source
from tests.oracle.cases import write_folder
from tests.tiny_run import assert_same_arrays, read_arrays, read_records, tiny_config

KEYS = {
    "model__add_tokens": "<one>,<two>",
    "data__control_tokens": "keep",
    "adapter__rank": 4,
    "adapter__dropout": 0.2,
    "adapter__dora": True,
    "adapter__start": "pissa",
    "adapter__train": "^norm",
    "adapter__added_rows": True,
    "train__save_every": 2,
}


def test_what_others_will_not_read_is_said_before_the_data_is(tmp_path, capfd):
    config = tiny_config(tmp_path, adapter__rank=2, adapter__train="router|^norm")
    write_folder("deepseek_v3_packed", tmp_path / "base")
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        train(config)
    said = " ".join(capfd.readouterr().err.split())
    assert (
        "jaxft export will refuse this run's adapter alone: PEFT saves modules as a whole" in said
    )
    assert "only layers.1.mlp.routed.router.w is trained" in said and "(--merge)" in said
    assert "PEFT (0.21) takes the adapters of layers.0.mlp.down," in said
    assert "layers.1.mlp.shared.up for those of the experts" in said


@pytest.mark.parametrize(
    ("trained", "ending"), [("router", "-model --verify --merge"), ("", "-adapter --verify")]
)
def test_the_export_that_is_named_after_a_run_is_one_that_works(tmp_path, trained, ending):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    write_folder("deepseek_v3_packed", model)
    keys = AdapterConfig(rank=2, targets=r"attn\.o$", train=trained)
    adaptation = adapted(Source(model).architecture, keys).adaptation
    AdapterNote(adaptation, "base", "", "", "float32").write(model)
    assert export_command(tmp_path / "run").endswith(f"{tmp_path / 'run'}{ending}")


@pytest.mark.slow(seconds=12)
def test_a_run_goes_on_bit_for_bit_and_refuses_another_base(tmp_path):
    whole = tiny_config(tmp_path, "whole", train__steps=4, **KEYS)
    train(whole)
    parts = tiny_config(tmp_path, "parts", train__steps=2, **KEYS)
    train(parts)
    parts.train.steps = 4
    train(parts, resume=True)
    checkpoint = tmp_path / "parts" / "checkpoints" / "4"
    assert_same_arrays(checkpoint, tmp_path / "whole" / "checkpoints" / "4")
    kept = {name for name in read_arrays(checkpoint) if name.startswith("params")}
    assert not [name for name in kept if name.endswith(".w']")]
    assert {"params['embed.rows']", "params['head.rows']", "params['norm.scale']"} <= kept
    losses = [record["loss"] for record in read_records(tmp_path / "parts" / "metrics.jsonl")]
    assert losses == [r["loss"] for r in read_records(tmp_path / "whole" / "metrics.jsonl")]
    note = read_note(tmp_path / "parts" / "model")
    assert note is not None and note.base == str(tmp_path / "base")
    assert len(note.adaptation.sites) == 7 and len(note.adaptation.rows) == 2

    parts.adapter.alpha = 99.0
    with pytest.raises(CheckpointError, match=r"adapter\.alpha was 0\.0"):
        train(parts, resume=True)
    parts.adapter.alpha = 0.0

    parts.train.steps, parts.optim.lora_plus = 5, 4.0
    parts.model.path = str((tmp_path / "base").rename(tmp_path / "moved"))
    train(parts, resume=True)
    note = read_note(tmp_path / "parts" / "model")
    assert note is not None and note.base == parts.model.path
    resumed_config = (tmp_path / "parts" / "config.json").read_text()

    file = tmp_path / "moved" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] + np.float32(0.01)}, file, {"format": "pt"})
    parts.train.steps = 6
    with pytest.raises(CheckpointError, match=r"not those that the adapter of .*parts, step 5 was"):
        train(parts, resume=True)
    assert (tmp_path / "parts" / "config.json").read_text() == resumed_config

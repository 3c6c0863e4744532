import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from tensorboardX.proto.event_pb2 import Event

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.files import append_jsonl, read_jsonl, write_json
from jaxft.training.flops import Learning, TrainingFlops, training_flops
from jaxft.workdir.metrics import MetricsWriter, train_record
from jaxft.workdir.periods import Period, Sums
from jaxft.workdir.workdir import Workdir


@pytest.fixture
def workdir(tmp_path):
    config = RunConfig()
    config.model.path = "org/model"
    workdir = Workdir.check(tmp_path / "run", config, resume=False, overwrite=False)
    workdir.begin(config)
    return workdir


def _scalars(folder):
    """Reads event files by their own framing: length, crc, message, crc."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return found


def test_flops_of_a_full_row_are_six_n_plus_twelve_l_h_t_per_token():
    # Llama-3.1-8B at 8192: 6 N + 12 L H T with N = 7,504,924,672 without the embedding.
    flops = training_flops(
        7_504_924_672, layers=32, heads=32, head_dim=128, tokens=8192, squared_lengths=8192**2
    )
    per_token = 6 * 7_504_924_672 + 12 * 32 * 4096 * 8192
    assert flops.full == pytest.approx(8192 * per_token)
    # Published: 7,139 tokens/s on a chip of 918 TFLOP/s are 40.0 % causal and 45.0 % full.
    assert 7139 * flops.causal / 8192 / 918e12 == pytest.approx(0.400, abs=0.001)
    assert 7139 * flops.full / 8192 / 918e12 == pytest.approx(0.450, abs=0.001)


def test_what_is_frozen_takes_no_gradient_of_its_weights():
    numbers = {"layers": 2, "heads": 4, "head_dim": 8, "tokens": 100, "squared_lengths": 0}
    half = training_flops(10, learning=Learning(trained=5, passed=10, attends_back=True), **numbers)
    assert half.full == (2 * 10 + 2 * 5 + 2 * 10) * 100
    numbers["squared_lengths"] = 100
    whole, head = (
        training_flops(0, learning=Learning(trained=0, passed=0, attends_back=back), **numbers)
        for back in (True, False)
    )
    assert whole.full == 3 * head.full


def test_tokens_without_a_trained_target_do_not_meet_the_head():
    numbers = {"layers": 0, "heads": 1, "head_dim": 1, "squared_lengths": 0}
    learning = Learning(trained=10, passed=10, attends_back=True, head=4, head_products=3)
    found = training_flops(
        10, learning=learning, tokens=100, untrained_tokens=60, forward_passes=1, **numbers
    )
    # Of every token the 6 parameters below the head, of 40 tokens its 4: in three products of the
    # step and in one of the reference.
    assert found.full == 2 * (3 + 1) * (6 * 100 + 4 * 40)


def test_packed_documents_cost_less_attention_than_one_long_row():
    numbers = {"layers": 2, "heads": 4, "head_dim": 8, "tokens": 100}
    whole = training_flops(10, squared_lengths=100**2, **numbers)
    halves = training_flops(10, squared_lengths=2 * 50**2, **numbers)
    weights = 6 * 10 * 100
    assert halves.full - weights == pytest.approx((whole.full - weights) / 2)
    assert halves.causal - weights == pytest.approx((halves.full - weights) / 2)


def test_full_flops_equal_the_matrix_products_of_forward_and_backward():
    tokens, heads, head_dim, width, mlp = 16, 4, 8, 32, 48

    def model(weights, x):
        q, k, v = (jnp.reshape(x @ w, (tokens, heads, head_dim)) for w in weights[:3])
        scores = jnp.einsum("tnh,snh->nts", q, k)
        y = jnp.einsum("nts,snh->tnh", scores, v).reshape(tokens, width) @ weights[3]
        return jnp.sum((y @ weights[4]) @ weights[5])

    weights = [jnp.ones((width, width))] * 4 + [jnp.ones((width, mlp)), jnp.ones((mlp, width))]
    x = jnp.ones((tokens, width))
    jaxpr = jax.make_jaxpr(jax.grad(model, argnums=(0, 1)))(weights, x)
    counted = 0
    for equation in jaxpr.jaxpr.eqns:
        if equation.primitive is lax.dot_general_p:
            ((contracted, _), _) = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            counted += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    parameters = sum(w.size for w in weights)
    expected = training_flops(
        parameters,
        layers=1,
        heads=heads,
        head_dim=head_dim,
        tokens=tokens,
        squared_lengths=tokens**2,
    )
    assert expected.full == counted


def test_record_normalises_sums_once():
    counts = {"tokens": 400, "trained_tokens": 20}
    sums = Sums({"loss": (30.0, 20.0), "margin": (6.0, 4.0)}, counts, {}, seconds=2.0)
    record = train_record(
        Period(7, sums, {"learning_rate": 0.5, "grad_norm": 2.0}),
        tokens=1000,
        trained_tokens=90,
        seconds=11.0,
        flops=TrainingFlops(4e12, 5e12),
        peak_flops=10e12,
    )
    assert record.pop("host_memory_peak") >= record.pop("host_memory") > 0
    assert record == {
        "step": 7,
        "loss": 1.5,
        "learning_rate": 0.5,
        "grad_norm": 2.0,
        "tokens": 1000,
        "trained_tokens": 90,
        "tokens_per_second": 200.0,
        "mfu": 0.2,
        "mfu_full": 0.25,
        "seconds": 11.0,
        "margin": 1.5,
    }


def test_record_without_a_known_peak_has_no_mfu():
    sums = Sums({"loss": (1.0, 0.0)}, {"tokens": 1, "trained_tokens": 0})
    period = Period(1, sums, {"learning_rate": 0.0, "grad_norm": 0.0})
    record = train_record(period, tokens=1, trained_tokens=0, seconds=0)
    assert "mfu" not in record
    assert math.isnan(record["loss"])


def test_records_are_on_disk_at_once_and_at_the_end_in_tensorboard(workdir):
    with MetricsWriter(workdir, start_step=0) as writer:
        writer.write({"step": 10, "loss": 1.5, "grad_norm": math.nan})
        assert list(read_jsonl(workdir.metrics)) == [{"step": 10, "loss": 1.5, "grad_norm": None}]
        writer.write_eval(
            {"step": 10, "dataset": "validation", "loss": 2.0, "exact_match": {"value": 0.25}}
        )
        writer.write_sample({"step": 10, "prompt": "a", "output": "b", "reference": None})
    assert json.loads(workdir.evaluations.read_text())["loss"] == 2.0
    assert json.loads(workdir.samples.read_text())["output"] == "b"
    scalars = _scalars(workdir.events)
    assert ("train/loss", 10, 1.5) in scalars
    assert ("eval/validation/loss", 10, 2.0) in scalars
    assert ("eval/validation/exact_match", 10, 0.25) in scalars
    assert "train/grad_norm" not in {name for name, _, _ in scalars}


def test_resume_takes_back_what_was_written_after_the_checkpoint(workdir):
    for step in (10, 20, 30):
        append_jsonl(workdir.metrics, {"step": step, "loss": 1.0})
        append_jsonl(workdir.evaluations, {"step": step, "dataset": "validation"})
    with workdir.metrics.open("ab") as file:
        file.write(b'{"step": 15, "lo')  # torn by the kill
    with MetricsWriter(workdir, start_step=20) as writer:
        writer.write({"step": 30, "loss": 2.0})
    steps = [(r["step"], r["loss"]) for r in read_jsonl(workdir.metrics)]
    assert steps == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert workdir.metrics.read_text().count("\n") == 3
    assert [r["step"] for r in read_jsonl(workdir.evaluations)] == [10, 20]


def test_wandb_that_is_asked_for_and_missing_is_an_error_before_the_start(workdir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        MetricsWriter(workdir, start_step=0, wandb_project="p")
    assert not workdir.events.exists()


def test_wandb_gets_config_and_records_where_it_is_there(workdir, monkeypatch):
    # wandb needs an account, so its three calls are recorded instead.
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()
    fake.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricsWriter(workdir, start_step=0, wandb_project="p") as writer:
        writer.write({"step": 1, "loss": 2.0})
    assert calls[0]["project"] == "p" and calls[0]["group"] == workdir.path.name
    assert calls[0]["config"]["model.path"] == "org/model"
    assert calls[1:] == [(1, {"train/loss": 2.0}), "end"]
    config = json.loads(workdir.config.read_text("utf-8"))
    write_json(workdir.config, config | {"train.name": "shop"})
    with MetricsWriter(workdir, start_step=0, wandb_project="p"):
        assert calls[3]["group"] == "shop"

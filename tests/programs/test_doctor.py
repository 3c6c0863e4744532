import fcntl
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from jaxft.config import RunConfig
from jaxft.hardware.devices import Room
from jaxft.hf.peft.adapter import Adapter
from jaxft.hf.peft.write import write_adapter
from jaxft.models.config import Numerics
from jaxft.programs import capacity, doctor
from jaxft.programs.doctor import (
    Check,
    check_cache,
    check_disk,
    check_hub,
    check_libtpu_lock,
    check_missed_accelerator,
    check_python,
    check_requirements,
    check_run_memory,
    print_checks,
    run_doctor,
)
from jaxft.programs.estimates import Estimates
from jaxft.workdir.source import find_architecture

_TOKEN = "hf_secret"


@pytest.fixture
def hub():
    """A hub on the loopback interface that knows one token."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers.get("Authorization") == f"Bearer {_TOKEN}"
            assert self.path == "/api/whoami-v2"
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"name": "ada"} if known else {}).encode())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def model(tmp_path):
    """The config.json of a Llama of 1,696 parameters, without weights."""
    config = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    # embedding; q, k, v, o; gate, up, down; three norms
    count = 50 * 16 + (16 * 16 + 2 * 16 * 8 + 16 * 16) + 3 * 16 * 8 + 3 * 16
    return str(tmp_path / "model"), count


def test_every_part_is_looked_at_and_nothing_raises(monkeypatch, capsys):
    names = {check.name for check in run_doctor()}
    assert {"python", "packages", "devices", "matrix product", "host memory"} <= names
    assert {"disk", "compilation cache", "hub", "wandb"} <= names
    monkeypatch.setattr(doctor, "_check_host_memory", lambda: 1 / 0)
    (broken,) = [check for check in run_doctor() if check.name == "host memory"]
    assert broken.status == "error"
    assert "ZeroDivisionError" in broken.detail


def test_exit_code_is_1_only_for_errors(capsys):
    assert print_checks([Check("a", "ok", "x"), Check("b", "warning", "y", "do [z]")]) == 0
    assert print_checks([Check("a", "error", "x")]) == 1
    assert "do [z]" in capsys.readouterr().out


def test_packages_are_held_against_their_bounds():
    found = list(
        check_requirements(
            ["jax>=0.4", "numpy>=999", "no-such-thing>=1", "wandb>=1; extra == 'wandb'"]
        )
    )
    assert [(check.name, check.status) for check in found] == [
        ("numpy", "error"),
        ("no-such-thing", "error"),
        ("packages", "ok"),
    ]
    assert found[0].advice == "pip install 'numpy>=999'"
    assert f"jax {jax.__version__}" in found[2].detail


def test_python_is_held_against_its_bound():
    assert check_python(">=3.12").status == "ok"
    assert check_python(">=9").status == "error"


def test_an_accelerator_that_jax_does_not_use_is_reported(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    (check,) = check_missed_accelerator("cpu", {"gpu"})
    assert "jax[cuda13]" in check.advice
    (check,) = check_missed_accelerator("cpu", {"tpu"})
    assert "jax[tpu]" in check.advice
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (check,) = check_missed_accelerator("cpu", {"gpu"})
    assert check.advice == "JAX_PLATFORMS is 'cpu'; unset it."
    assert not list(check_missed_accelerator("gpu", {"gpu"}))
    assert not list(check_missed_accelerator("cpu", set()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libtpu runs on Linux only")
def test_a_tpu_lock_held_by_another_process_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as without libtpu
    path = tmp_path / "lock"
    assert list(check_libtpu_lock(tmp_path / "absent")) == []
    path.touch()
    (check,) = check_libtpu_lock(path)
    assert check.status == "ok"
    code = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        (check,) = check_libtpu_lock(path)
        holder.stdin.close()
    assert check.status == "warning"
    assert "JAX_PLATFORMS=cpu" in check.advice
    with path.open() as file:  # free again: the check itself leaves no lock behind
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_disk_is_held_against_the_checkpoints_of_the_model(tmp_path, model, monkeypatch):
    path, count = model
    config = RunConfig()
    config.model.path, config.train.workdir = path, str(tmp_path / "not" / "there")
    (check,) = check_disk(config)
    assert check.status == "ok"
    assert f"({count:,} parameters)" in check.detail
    needed = count * 4 * 3 * 4
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    (check,) = check_disk(config)
    assert check.status == "error"
    assert "train.keep_last" in check.advice


def test_a_run_is_judged_with_the_codes_and_adapters_that_it_will_hold(model, monkeypatch):
    config, judged = RunConfig(), []
    config.model.path, config.model.quantise, config.adapter.rank = model[0], "nf4", 2
    judge = capacity.judge
    monkeypatch.setattr(capacity, "judge", lambda *given: judged.append(given[1]) or judge(*given))
    assert list(check_run_memory(config))
    held = judged[0].architecture
    found, planned = (a.abstract(Numerics()) for a in (held, find_architecture(config)))
    assert found.params == planned.params
    assert any(path.endswith(".codes") for path in found.params)
    (check,) = check_disk(config)
    trained = sum(s.size for path, s in found.params.items() if ".lora" in path)
    assert f"({model[1] + trained:,} parameters)" in check.detail


def test_a_run_that_goes_on_from_an_adapter_is_judged_with_it(model, tmp_path):
    config = RunConfig()
    config.model.path = model[0]
    whole = find_architecture(config)
    shapes = {path: spec.shape for path, spec in whole.abstract(Numerics()).params.items()}
    q, rank = whole.config, 2
    arrays = {
        "layers.attn.q.lora_a": np.ones((q.layers, rank, q.embed), np.float32),
        "layers.attn.q.lora_b": np.ones((q.layers, q.heads, q.head_dim, rank), np.float32),
    }
    write_adapter(tmp_path, Adapter(arrays, {"layers.attn.q": 4.0}), whole.naming, shapes)
    config.adapter.path = str(tmp_path)
    (check,) = check_disk(config)
    trained = sum(array.size for array in arrays.values())
    assert f"({model[1] + trained:,} parameters)" in check.detail


def test_disk_of_a_model_that_is_not_here_is_only_reported(tmp_path):
    config = RunConfig()
    config.model.path, config.train.workdir = "no-such-org/no-such-model", str(tmp_path)
    (check,) = check_disk(config)
    assert check.status == "ok"
    assert "size is unknown" in check.detail


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, never writable")
def check_memory(config, monkeypatch, limit, free):
    monkeypatch.setattr(capacity, "room", lambda devices: Room(limit, free, "this machine"))
    (check,) = check_run_memory(config)
    return check


def test_what_a_run_takes_is_held_against_the_memory_that_is_here(tmp_path, model, monkeypatch):
    config = RunConfig()
    config.model.path, config.data.train = str(model[0]), "train.jsonl"
    config.strategy, config.mesh.data = "ddp", 1
    config.data.max_length = 64
    (check,) = check_run_memory(config)
    assert check.status == "ok" and "on a device by estimate (" in check.detail
    estimates = Estimates(find_architecture(config))
    whole = capacity.judge(config, estimates, capacity.here(config)).bytes
    check = check_memory(config, monkeypatch, 2 * whole, whole - 1)
    assert check.status == "warning" and "now in use" in check.detail
    check = check_memory(config, monkeypatch, whole - 1, whole - 1)
    assert check.status == "error" and check.detail.startswith("does not fit: ")
    assert "--config." in check.advice
    check = check_memory(config, monkeypatch, 1000, 1000)
    assert "jaxft plan --topology=" in check.advice
    config.model.remat = "auto"
    check = check_memory(config, monkeypatch, 2 * whole, whole)
    assert (
        check.status == "ok"
        and "on a device, where model.remat 'auto' takes full, by estimate" in check.detail
    )
    config.train.accumulation = 3
    (check,) = check_run_memory(config)
    assert check.status == "error" and "train.accumulation" in check.advice
    assert list(check_run_memory(None)) == []


@pytest.mark.parametrize("path", ["org/not-here", "runs/of/mine/not-here"])
def test_memory_of_a_model_that_is_not_here_is_unknown(path):
    config = RunConfig()
    config.model.path = path
    (check,) = check_run_memory(config)
    assert check.status == "warning" and "config.json is not on this machine" in check.detail


def test_a_compilation_cache_that_cannot_be_written_is_reported(tmp_path):
    (check,) = check_cache(str(tmp_path / "a" / "b"))
    assert check.status == "ok"
    assert not (tmp_path / "a").exists()
    (check,) = check_cache("/proc/self/jaxft")
    assert check.status == "warning"
    (check,) = check_cache("off")
    assert check.detail == "off"


def test_the_hub_is_asked_who_the_token_belongs_to(hub):
    reach, token = check_hub(hub, token=_TOKEN, offline=False)
    assert (reach.status, token.status) == ("ok", "ok")
    assert token.detail == "valid, of ada"


def test_a_revoked_token_is_reported_and_never_shown(hub):
    checks = list(check_hub(hub, token="hf_old", offline=False))
    assert checks[1].status == "warning"
    assert "hf_old" not in str(checks)


def test_no_token_is_fine(hub):
    reach, token = check_hub(hub, token=None, offline=False)
    assert (reach.status, token.status) == ("ok", "ok")


def test_an_offline_run_does_not_ask_the_hub():
    (check,) = check_hub("http://127.0.0.1:9", token=_TOKEN, offline=True)
    assert check.status == "ok"
    assert "HF_HUB_OFFLINE" in check.detail


def test_a_hub_that_is_not_there_is_reported():
    (check,) = check_hub("http://127.0.0.1:9", token=None, offline=False)
    assert check.status == "warning"
    assert "refused" in check.detail


def test_a_hub_that_never_answers_does_not_hang_the_doctor(monkeypatch):
    monkeypatch.setattr(doctor, "_HUB_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        port = silent.getsockname()[1]
        (check,) = check_hub(f"http://127.0.0.1:{port}", token=None, offline=False)
    assert check.status == "warning"
    assert time.monotonic() - start < 2


def test_a_name_look_up_that_hangs_does_not_hang_the_doctor(monkeypatch):
    monkeypatch.setattr(doctor, "_HUB_TIMEOUT", -0.9)
    release = threading.Event()
    monkeypatch.setattr(doctor, "_ask_hub", lambda endpoint, token: release.wait(5))
    start = time.monotonic()
    (check,) = check_hub("http://hub", token=None, offline=False)
    release.set()
    assert check.status == "warning"
    assert time.monotonic() - start < 2


def test_wandb_is_an_error_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [check.status for check in doctor._check_wandb("")] == ["ok"]
    assert [check.status for check in doctor._check_wandb("project")] == ["error"]

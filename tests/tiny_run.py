"""A run small enough for a test: a two-layer Llama, its tokenizer, a handful of conversations."""

import json
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxft.config import RunConfig, to_dict
from jaxft.programs import trainer
from tests.oracle.cases import write_folder

_TEMPLATE = """\
{%- for message in messages -%}
{{- '<' + message['role'] + '>' + message['content'] + '<end>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""
_SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789"


def write_base(folder: Path) -> Path:
    """Writes the folder of a tiny model with a tokenizer of single letters; returns it."""
    folder.mkdir(parents=True)
    write_folder("gqa", folder)
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *_LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


def write_chats(path: Path, count: int, *, seed: int = 0) -> Path:
    """Writes conversations of differing lengths, one a line; returns the path."""
    generator = random.Random(seed)
    lines = []
    for number in range(count):
        word = "".join(generator.choices("abcdef", k=generator.randint(1, 9)))
        messages = [
            {"role": "user", "content": f"say {word} {number}"},
            {"role": "assistant", "content": word[::-1]},
        ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


def tiny_config(folder: Path, workdir: str = "run", **changes: object) -> RunConfig:
    """Returns the config of a run on `folder/base`, `train.jsonl` and `held_out.jsonl` there.

    Args:
      folder: Filled on first use.
      workdir: Name of the run in it.
      changes: Keys with `__` for the dot, such as `train__steps=4`.
    """
    if not (folder / "base").exists():
        write_base(folder / "base")
        write_chats(folder / "train.jsonl", 40)
        write_chats(folder / "held_out.jsonl", 9, seed=1)
    config = RunConfig()
    config.strategy = "ddp"
    config.mesh.data = 1
    config.model.path = str(folder / "base")
    config.model.dtypes = "float32"
    config.model.remat = "none"
    config.data.train = str(folder / "train.jsonl")
    config.data.max_length = 48
    config.data.cache = str(folder / "cache")
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "constant"  # or the step would be compiled for each number of steps
    config.optim.warmup_steps = 2
    config.train.workdir = str(folder / workdir)
    config.train.steps = 8
    config.train.batch_size = 4
    config.train.log_every = 1
    config.train.save_every = 0
    config.train.compilation_cache = os.environ["JAXFT_TEST_PROGRAMS"]
    config.eval.samples = 0
    for name, value in changes.items():
        node, _, leaf = name.rpartition("__")
        setattr(getattr(config, node) if node else config, leaf, value)
    return config


def crash(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, *, step: int, resume: bool = False
) -> None:
    """Runs `config` until `step` is dispatched, which fails as a lost device would."""
    calls: list[None] = []

    def put(batch: Any, sharding: Any, **places: Any) -> Any:
        # Evaluation has its own; the loop calls this one once a step.
        calls.append(None)
        if len(calls) == step:
            raise RuntimeError("device lost")
        return original(batch, sharding, **places)

    original = trainer.put
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "put", put)
        with pytest.raises(RuntimeError, match="device lost"):
            trainer.train(config, resume=resume)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSON-lines file; every line must hold one."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run without what depends on the clock and the machine."""
    kept = ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")
    return [{name: r[name] for name in kept} for r in read_records(workdir / "metrics.jsonl")]


def read_arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a checkpoint, parameters and moments, read by Orbax alone."""
    arrays = {}
    for item in ("params", "optimizer"):
        with ocp.StandardCheckpointer() as reader, warnings.catch_warnings():
            # It restores what it finds, which Orbax advises against for other meshes.
            warnings.simplefilter("ignore")
            tree = reader.restore(checkpoint / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def assert_same_arrays(one: Path, other: Path) -> None:
    """Compares two checkpoints bit for bit."""
    a, b = read_arrays(one), read_arrays(other)
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    assert not different, different


def command(config: RunConfig, *options: str) -> list[str]:
    """Returns the command line of `jaxft train` for a config."""
    default = to_dict(RunConfig())
    flags = [f"--config.{k}={v}" for k, v in to_dict(config).items() if v != default[k]]
    return [sys.executable, "-m", "jaxft", "train", *flags, *options]

"""What jaxft exports, read by transformers 4 and 5, PyTorch and PEFT."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxft
from jaxft.hf.peft.adapter import Adapter
from jaxft.hf.peft.write import taken_for_experts, write_adapter
from jaxft.hf.save_tokenizer import save_tokenizer
from jaxft.hf.tokenizer import add_special_tokens, load_tokenizer
from jaxft.programs.generate import generate_tokens
from tests.adapters import (
    add_rest,
    bare_model,
    linear_sites,
    logits_of,
    merged,
    random_adapter,
    shapes_of,
)
from tests.oracle import towers
from tests.oracle.cases import FAMILY_CASES, write_folder
from tests.oracle.read_tokenizer import describe
from tests.strategies import COMPOSED
from tests.tiny import Tiny
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow(seconds=20)


@pytest.fixture(scope="session")
def oracle() -> str:
    """A Python with torch and transformers; .ci/run makes one."""
    python = os.environ.get("JAXFT_ORACLE_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("JAXFT_ORACLE_PYTHON names no Python with torch and transformers")
    return python


@pytest.fixture(scope="session")
def peft(oracle) -> str:
    """The same Python where it has PEFT, too."""
    if subprocess.run([oracle, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip("JAXFT_ORACLE_PYTHON has no peft")
    return oracle


@pytest.fixture(scope="session")
def oracle_4() -> str:
    """A Python with transformers 4.57; .ci/run makes one."""
    python = os.environ.get("JAXFT_ORACLE_PYTHON_4", "")
    if not Path(python).is_file():
        pytest.skip("JAXFT_ORACLE_PYTHON_4 names no Python with transformers 4.57")
    return python


def check(oracle: str, model: jaxft.Model, folder: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(5, model.architecture.config.vocab, (2, 24))
    np.save(tmp_path / "tokens.npy", tokens)
    script = Path(__file__).parent / "oracle/read_export.py"
    arguments = [oracle, script, folder, tmp_path / "tokens.npy", tmp_path / "out.npz"]
    subprocess.run(arguments, check=True)
    theirs = np.load(tmp_path / "out.npz")
    assert np.max(np.abs(theirs["logits"] - np.asarray(model(tokens)))) < 1e-4
    ours = generate_tokens(
        model.architecture.config,
        model.abstract.graphdef,
        model.params,
        tokens[:1].tolist(),
        max_new_tokens=32,
        stop_ids=model.stop_ids,
    )[0]
    continuation = theirs["continuation"].tolist()
    stop = next((i for i, token in enumerate(continuation) if token in model.stop_ids), None)
    assert ours == continuation[:stop]


def test_a_fine_tuned_model_gives_the_same_logits_and_text_in_transformers(oracle, tmp_path):
    result = jaxft.train(tiny_config(tmp_path, train__steps=10, optim__learning_rate=1e-2))
    folder = jaxft.export(result.checkpoint, tmp_path / "out")
    check(oracle, jaxft.load(result.checkpoint), folder, tmp_path)


def test_a_model_with_added_tokens_gives_the_same_logits_and_text_in_transformers(oracle, tmp_path):
    tokens = ",".join(f"<new{i}>" for i in range(30))
    config = tiny_config(tmp_path, train__steps=4, model__add_tokens=tokens)
    result = jaxft.train(config)
    model = jaxft.load(result.checkpoint)
    assert model.architecture.config.vocab == 128
    folder = jaxft.export(result.checkpoint, tmp_path / "out")
    check(oracle, model, folder, tmp_path)


def test_a_real_model_gives_the_same_logits_and_text_in_transformers(oracle, shared, tmp_path):
    source = shared / "models/stories260K"
    folder = jaxft.export(source, tmp_path / "out")
    check(oracle, jaxft.load(source), folder, tmp_path)


def adapters_to_read() -> dict[str, tuple[str, Adapter]]:
    """Returns `{name: (case of a model, adapter)}`, each kind of adapter for each family.

    Of families that consist of others' parts only the names of all their sites are checked.
    """
    found: dict[str, tuple[str, Adapter]] = {}
    for family, cases in FAMILY_CASES.items():
        tiny = bare_model(cases[0])
        sites = linear_sites(tiny)
        taken = taken_for_experts(sites, tiny.architecture.naming)
        sites = [site for site in sites if site not in taken]
        found[f"{family}_all"] = (
            cases[0],
            random_adapter(tiny, dict.fromkeys(sites, 3), dropout=0.1),
        )
        if family in COMPOSED:
            continue
        ranks = {site: 1 + number % 3 for number, site in enumerate(sites)}
        some = [site for site in sites if site.endswith(("mlp.up", "attn.o"))]
        made = {
            "ranks": random_adapter(tiny, ranks, pissa=True, rslora=True),
            "some": random_adapter(tiny, dict.fromkeys(some, 2)),
        }
        if tiny.architecture.config.experts is None:
            made["dora"] = random_adapter(tiny, ranks, dora=True)
        tables = ["embed"] if tiny.architecture.config.tied else ["embed", "head"]
        made["rows"] = add_rest(tiny, tables, [], tokens=(9, 3, 5))
        norms = [path for path in tiny.params if path.split(".")[-2] == "norm"]
        made["whole"] = add_rest(tiny, [], [*norms, *(f"{table}.w" for table in tables)])
        found |= {f"{family}_{kind}": (cases[0], adapter) for kind, adapter in made.items()}
    return found


@pytest.mark.slow(seconds=120)
def test_adapters_give_the_same_logits_in_peft(peft, tmp_path):
    made = adapters_to_read()
    for name, (case, adapter) in made.items():
        for part in ("base", "adapter"):
            (tmp_path / name / part).mkdir(parents=True)
        write_folder(case, tmp_path / name / "base")
        tiny = bare_model(case)
        naming, shapes = tiny.architecture.naming, shapes_of(tiny)
        write_adapter(tmp_path / name / "adapter", adapter, naming, shapes)
        np.save(tmp_path / name / "tokens.npy", np.random.default_rng(0).integers(60, size=(1, 16)))
    script = Path(__file__).parent / "oracle/read_adapters.py"
    subprocess.run([peft, script, *(tmp_path / name for name in made)], check=True)
    for name, (case, adapter) in made.items():
        tiny, tokens = bare_model(case), np.load(tmp_path / name / "tokens.npy")
        theirs = np.load(tmp_path / name / "logits.npy")
        logits = logits_of(tiny.abstract.graphdef)
        ours = logits(merged(tiny, adapter), tokens)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=name)
        assert np.max(np.abs(logits(tiny.params, tokens) - theirs)) > 1e-2, name


@pytest.mark.slow(seconds=5)
def test_adapters_of_multimodal_models_give_the_same_logits_in_peft(peft, tmp_path):
    """On the multimodal class, whose towers for images have modules of the same names."""
    cases, ours = ("gemma3", "gemma4"), {}
    for case in cases:
        for part in ("base", "adapter"):
            (tmp_path / case / part).mkdir(parents=True)
        model = jaxft.load(towers.write_tower(case, tmp_path / case / "base"))
        tiny = Tiny(model.architecture, model.abstract, model.params)
        adapter = random_adapter(tiny, dict.fromkeys(linear_sites(tiny), 3))
        naming, shapes = tiny.architecture.naming, shapes_of(tiny)
        write_adapter(tmp_path / case / "adapter", adapter, naming, shapes)
        np.save(tmp_path / case / "tokens.npy", towers.tokens())
        logits = logits_of(tiny.abstract.graphdef)
        ours[case] = logits(merged(tiny, adapter), towers.tokens())
        assert np.max(np.abs(logits(tiny.params, towers.tokens()) - ours[case])) > 1e-2
    script = Path(__file__).parent / "oracle/read_adapters.py"
    subprocess.run([peft, script, *(tmp_path / case for case in cases)], check=True)
    for case in cases:
        theirs = np.load(tmp_path / case / "logits.npy")
        np.testing.assert_allclose(ours[case], theirs, atol=1e-4, err_msg=case)


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHARED = (
    "tokenizers/bert-base-uncased",
    "tokenizers/deepseek-r1",
    "tokenizers/gpt2",
    "tokenizers/mistral-v3",
    "tokenizers/qwen3-hf",
    "models/stories260K",
)


def read_in(python: str, folders: list[Path]) -> dict[str, Any]:
    script = Path(__file__).parent / "oracle/read_tokenizer.py"
    done = subprocess.run([python, script, *folders], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def assert_both_read_alike(oracle_4: str, folders: list[Path]) -> None:
    ours = {folder: json.loads(json.dumps(describe(load_tokenizer(folder)))) for folder in folders}
    for python in (sys.executable, oracle_4):
        found = read_in(python, folders)
        for folder, expected in ours.items():
            theirs = found[str(folder)]
            different = {
                name: (value, theirs[name])
                for name, value in expected.items()
                if value != theirs[name]
            }
            assert not different, (python, folder.name)


def write_variants(source: Path, out: Path) -> list[Path]:
    """Writes a tokenizer as runs leave it: as it is, with tokens and another template, again."""
    folders = []
    for tokens, template in (([], None), (["<new>", "<other>"], TEMPLATE)):
        tokenizer = load_tokenizer(source)
        add_special_tokens(tokenizer, tokens)
        folder = out / f"{source.name}-{len(folders)}"
        folder.mkdir()
        save_tokenizer(tokenizer, folder, template)
        folders.append(folder)
    # An export of a run reads what the run has kept.
    again = out / f"{source.name}-again"
    again.mkdir()
    save_tokenizer(load_tokenizer(folders[-1]), again)
    return [*folders, again]


@pytest.mark.slow(seconds=70)
def test_real_tokenizers_are_read_alike_by_transformers_4_and_5(oracle_4, shared, tmp_path):
    sources = [*(shared / name for name in SHARED), Path(jaxft.__file__).parent / "demo/base"]
    folders = [folder for source in sources for folder in write_variants(source, tmp_path)]
    assert_both_read_alike(oracle_4, folders)
    # What is given is what transformers 4 makes of the source.
    theirs = read_in(oracle_4, sources)
    for source in sources:
        ours = describe(load_tokenizer(source))
        assert ours["ids"] == theirs[str(source)]["ids"], source.name
        assert ours["texts"] == theirs[str(source)]["texts"], source.name


@pytest.mark.slow(seconds=20)
def test_tokenizers_of_every_making_are_read_alike_by_transformers_4_and_5(
    oracle_4, shared, tmp_path
):
    settings = {
        # BOS by default, and not at all, whatever tokenizer.json says.
        "begin": {"tokenizer_class": "LlamaTokenizer", "legacy": False},
        "no_begin": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False},
        "end": {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True},
        # As transformers 5 writes it: version 4 does not read it.
        "five": {
            "tokenizer_class": "TokenizersBackend",
            "backend": "tokenizers",
            "extra_special_tokens": ["<extra>"],
        },
        "named": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": [
                {"name": "default", "template": "plain: " + TEMPLATE},
                {"name": "tool_use", "template": "tools: {{ tools }} " + TEMPLATE},
                {"name": "rag", "template": "rag: " + TEMPLATE},
            ],
        },
    }
    folders = []
    for name, content in settings.items():
        source = tmp_path / name
        source.mkdir()
        for file in ("tokenizer.json", "tokenizer.model"):
            (source / file).write_bytes((shared / "models/stories260K" / file).read_bytes())
        words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **content}
        (source / "tokenizer_config.json").write_text(json.dumps(words))
        out = tmp_path / "out" / name
        out.mkdir(parents=True)
        folders += write_variants(source, out)
    # Pieces and their scores alone.
    source = tmp_path / "pieces"
    source.mkdir()
    file = shared / "models/stories260K/tokenizer.model"
    (source / file.name).write_bytes(file.read_bytes())
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    folders += write_variants(source, tmp_path)
    assert_both_read_alike(oracle_4, folders)
    named = load_tokenizer(tmp_path / "out/named/named-1").chat_template
    assert named == {
        "default": TEMPLATE,
        "tool_use": TEMPLATE,
        "rag": "rag: " + TEMPLATE,
    }


@pytest.mark.parametrize("case", ["gemma3", "gemma4", "qwen3_5"])
def test_a_multimodal_model_has_its_other_tower_and_our_text_in_transformers(
    oracle, tmp_path, case
):
    config = tiny_config(tmp_path, train__steps=4, optim__learning_rate=1e-2)
    towers.write_tower(case, tmp_path / "base")
    jaxft.train(config)
    jaxft.export(tmp_path / "run", tmp_path / "out")
    np.save(tmp_path / "tokens.npy", towers.tokens())
    script, found = Path(__file__).parent / "oracle/read_tower.py", {}
    for name in ("base", "out"):
        numbers = tmp_path / f"{name}.npz"
        arguments = [oracle, script, tmp_path / name, tmp_path / "tokens.npy", numbers]
        subprocess.run(arguments, check=True)
        found[name] = dict(np.load(numbers))
    before, after = found["base"].pop("logits"), found["out"].pop("logits")
    assert found["base"].keys() == found["out"].keys() and len(found["out"]) > 10
    for name, value in found["base"].items():
        np.testing.assert_array_equal(found["out"][name], value)
    ours = np.asarray(jaxft.load(tmp_path / "run")(towers.tokens()))
    np.testing.assert_allclose(after, ours, atol=1e-4)
    assert np.max(np.abs(after - before)) > 0.01

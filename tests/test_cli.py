"""The command line: usage errors without tracebacks, and each command once for real."""

import importlib.metadata
import io
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

import jaxft
from jaxft import cli
from jaxft.cli import running
from jaxft.workdir.source import find_source
from tests.tiny_run import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny_config(folder)
    return folder


def flags(folder, **changes):
    keys = {
        "model.path": folder / "base",
        "model.dtypes": "float32",
        "strategy": "ddp",
        "data.train": folder / "train.jsonl",
        "data.validation": folder / "held_out.jsonl",
        "data.max_length": 48,
        "data.cache": folder / "cache",
        "train.workdir": folder / "run",
        "train.steps": 3,
        "train.batch_size": 8,
        "train.compilation_cache": folder / "xla",
        "eval.samples": 0,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config.{name}={value}" for name, value in keys.items()]


@pytest.fixture(scope="module")
def trained(folder):
    assert cli.main(["train", *flags(folder)]) == 0
    return folder / "run"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for command in ("train", "eval", "generate", "chat", "export", "data", "doctor"):
        assert f"\n    {command} " in text
    assert cli.main([]) == 2


def test_public_names_are_shown_and_importing_them_stays_lazy():
    code = "import sys, jaxft; print(dir(jaxft)); assert 'jax' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in jaxft.__all__:
        assert f"'{name}'" in run.stdout
    assert "importlib" not in run.stdout


def test_the_version_is_shown_without_starting_jax(capsys):
    code = "import sys, jaxft.cli\ntry: jaxft.cli.main(['--version'])\n"
    code += "except SystemExit: assert 'jax' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == f"jaxft {jaxft.__version__}, jax {importlib.metadata.version('jax')}\n"


def test_help_shows_every_default(capsys):
    shown = {}
    for command in ("train", "eval", "generate", "chat", "export", "convert", "plan"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        shown[command] = " ".join(capsys.readouterr().out.split())
    for text in (
        "(default: 128)",
        "0: most likely token (default: 0.0)",
        "all tokens (default: 0)",
    ):
        assert text in shown["generate"]
    assert "best (default)" in shown["export"] and "default: as stored" in shown["export"]
    assert "(default: 1024)" in shown["chat"]
    assert "-1" not in shown["train"]
    for action in cli.make_parser()._subparsers._group_actions[0].choices.values():
        assert all(a.help for a in action._actions), action.prog


@pytest.mark.slow(seconds=5)
def test_what_to_do_next_can_be_pasted(trained, folder, capsys):
    """Every command that training and export name is run as it stands."""
    arguments = ["train", *flags(folder), "--resume"]
    assert cli.main(arguments) == 0
    evaluate, export = [shlex.split(line) for line in next_commands(capsys)]
    assert evaluate[:2] == ["jaxft", "eval"] and export[:2] == ["jaxft", "export"]
    assert cli.main(evaluate[1:]) == 0
    assert [shlex.split(line) for line in next_commands(capsys)] == [export]
    assert cli.main(export[1:]) == 0
    [talk] = next_commands(capsys)
    assert talk == f"jaxft chat --model={trained}-model"


@pytest.mark.slow(seconds=15)
def test_a_run_in_this_folder_is_exported_beside_it(trained, monkeypatch):
    monkeypatch.chdir(trained)
    config = jaxft.RunConfig()
    for name in (".", "", "../run/checkpoints/..", "../run"):
        config.train.workdir = name
        expected = f"jaxft export --checkpoint={trained} --output={trained}-model --verify"
        assert running._after_training(config) == [expected]


def test_a_revision_of_a_folder_is_refused(trained, folder, capsys):
    for model in (folder / "base", trained):
        assert cli.main(["convert", str(model), "--check", "--revision=v2"]) == 1
        assert f"{model} is a folder, which has no revision 'v2'" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["data.train", "model.path", ""])
def test_a_relative_path_that_is_not_there_names_the_current_folder(
    folder, tmp_path, monkeypatch, capsys, key
):
    monkeypatch.chdir(tmp_path)
    flag = f"--config.{key}=./none.jsonl" if key else "--config=none.yaml"
    assert cli.main(["data", *flags(folder), flag]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"Relative paths start at the current folder, {tmp_path}." in said


@pytest.mark.parametrize("place", [".", "checkpoints/3", "checkpoints/.."])
def test_a_model_is_found_from_within_its_folder(trained, monkeypatch, place):
    monkeypatch.chdir(trained / place if place == "checkpoints/3" else trained)
    found = find_source(place if place == "checkpoints/.." else ".")
    assert found.step == 3
    assert found.name.startswith(f"{trained}, step 3")


def next_commands(capsys) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line.strip() for line in lines[lines.index("Next:") + 1 :] if line.startswith("  ")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--overwite"], "Did you mean '--overwrite'?"),
        (["train", "--config=none.py"], "no config file 'none.py'"),
        (["export", "--output=x"], "--checkpoint"),
        (["train", "--config.optim.learning_rat=1"], "'--config.optim.learning_rate'?"),
        (["train", "--learning_rate=1"], "Did you mean --config.optim.learning_rate=1?"),
        (["train"], "model.path is empty"),
        (["train", "--model.quantise=no"], "expected one of '', nf4"),
        (["train", "--profile=0"], "'0' is no whole number from 1 on"),
        (["generate", "--model=m", "--config.optim.beta1=1"], "Unknown argument"),
        (["generate", "--model=m", "--top_k=many"], "invalid int value"),
        (["train", "--config.train.workdir", "--config.train.steps=5"], "has no value"),
        (["export", "--checkpoint=c", "--output=x", "--dtype=bf16"], "expected one of float32"),
        (["export", "--checkpoint=c", "--output=x", "--step=5"], "c is not the folder of a run"),
        (["generate", "--model=m", "--prompt=a", "--step=banana"], "it has no step 'banana'"),
        (["export", "--checkpoint=r/checkpoints/7", "--output=x", "--step=5"], "of step 7"),
        (["eval", "--checkpoint=r", "--compare", "a", "b"], "leave --checkpoint out"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(capsys, arguments, words):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_generate_without_a_prompt_says_so(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert cli.main(["generate", "--model=m"]) == 2
    assert "There is no prompt" in capsys.readouterr().err


def test_a_model_that_is_not_there_exits_with_1(folder, capsys):
    changes = {"model__path": folder / "nothing", "train__workdir": folder / "other"}
    assert cli.main(["train", *flags(folder, **changes)]) == 1
    error = capsys.readouterr().err
    assert "There is no folder" in error and "Traceback" not in error


def test_printing_the_config_shows_every_key_and_trains_nothing(capsys):
    assert cli.main(["train", "--print_config", "--config.optim.learning_rate=2e-5"]) == 0
    text = capsys.readouterr().out
    assert "  # Peak learning rate.\n  learning_rate: 2.0e-05  # default: 1.0e-05\n" in text
    assert "  packing: documents\n" in text


def test_a_flag_and_its_value_may_be_two_words(capsys):
    assert cli.main(["train", "--print_config", "--config.train.steps", "7"]) == 0
    assert "  steps: 7  # default: 0" in capsys.readouterr().out


def test_output_that_nobody_reads_is_no_error():
    command = f"{sys.executable} -m jaxft train --print_config | head -1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("model:") and not result.stderr


def test_training_writes_a_workdir_and_refuses_it_afterwards(trained, folder, capsys):
    written = {path.name for path in trained.iterdir()}
    assert {
        "checkpoints",
        "config.json",
        "environment.json",
        "eval.jsonl",
        "events",
        "metrics.jsonl",
        "model",
        "report.html",
    } <= written
    assert cli.main(["train", *flags(folder)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["train", *flags(folder), "--resume", "--overwrite"]) == 2


def test_evaluation_prints_a_table_and_writes_json(trained, folder, capsys, tmp_path):
    output = tmp_path / "results.json"
    arguments = ["eval", *flags(folder), f"--checkpoint={trained}", f"--output={output}"]
    assert cli.main(arguments) == 0
    loss = json.loads(output.read_text())["results"]["validation"]["loss"]
    assert f"{loss:.4f}" in "".join(capsys.readouterr())


def test_comparison_shows_both_models(trained, folder, capsys):
    assert cli.main(["eval", *flags(folder), "--compare", str(folder / "base"), str(trained)]) == 0
    text = "".join(capsys.readouterr())
    assert f"A: {folder / 'base'}" in text and "B - A" in text


def test_export_and_generate_answer_from_the_new_folder(trained, folder, capsys, tmp_path):
    output = tmp_path / "out"
    arguments = ["export", f"--checkpoint={trained}", f"--output={output}", "--verify"]
    assert cli.main(arguments) == 0
    assert "All are equal." in capsys.readouterr().out
    arguments = ["generate", f"--model={output}", "--prompt=say abc", "--max_new_tokens=4"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("say abc\n")


@pytest.mark.slow(seconds=2)
def test_prompts_are_read_from_standard_input(trained):
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "jaxft",
            "generate",
            f"--model={trained}",
            "--raw",
            "--max_new_tokens=8",
        ],
        input="abc\n\nde\n",
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert [line[:2] for line in result.stdout.splitlines()] == ["ab", "de"]
    assert not result.stderr


def test_data_are_shown_before_training(folder, capsys):
    assert cli.main(["data", *flags(folder)]) == 0
    text = " ".join("".join(capsys.readouterr()).split())
    assert "What was detected" in text and "format messages" in text


def test_messages_tools_and_a_system_message_reach_the_template(trained, capsys, tmp_path):
    file = tmp_path / "asked.jsonl"
    turns = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "cba"}]
    rows = [{"messages": turns}, {"messages": [*turns, {"role": "user", "content": "say de"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["generate", f"--model={trained}", f"--messages={file}", "--max_new_tokens=4"]
    assert cli.main([*arguments, "--system=abc"]) == 0
    model = jaxft.load(trained)
    asked = [[{"role": "system", "content": "abc"}, *row["messages"]] for row in rows]
    expected = model.generate([asked[0][:-1], asked[1]], max_new_tokens=4)
    printed = capsys.readouterr().out
    assert printed == f"say abc\n  {expected[0]}\nsay de\n  {expected[1]}\n"
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "clock"}}]')
    assert cli.main([*arguments, f"--tools={tools}"]) == 2
    assert "has no place for tools" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--raw", "--system=a"], "--raw continues a text"),
        (["--prompt=a", "--messages=b"], "give one"),
        (["--messages=none.jsonl"], "none.jsonl cannot be read"),
        (["--prompt=a", "--max_new_tokens=0"], "expected at least 1"),
        (["--prompt=a", "--top_p=0"], "top_p is 0.0"),
        (["--prompt=a", "--top_k=5"], "--temperature=0 draws nothing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_is_read(capsys, arguments, words):
    assert cli.main(["generate", "--model=not_there", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_eval_refuses_an_output_that_cannot_be_written_before_it_reads_a_model(tmp_path, capsys):
    arguments = ["eval", "--config.model.path=nowhere", "--config.data.validation=nothing.jsonl"]
    for more in ([], ["--compare", "a", "b"]):
        assert cli.main([*arguments, *more, f"--output={tmp_path}/nodir/x.json"]) == 2
        assert f"there is no folder {tmp_path}/nodir" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", [["generate", "--prompt=a"], ["chat"]])
def test_a_model_without_tokenizer_cannot_talk(folder, capsys, tmp_path, command):
    shutil.copytree(folder / "base", tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    assert cli.main([command[0], f"--model={tmp_path / 'bare'}", *command[1:]]) == 1
    assert "has no tokenizer, so" in capsys.readouterr().err

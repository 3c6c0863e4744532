"""The demo of `make demo`: fine-tune the base model, measure before and after, export, ask."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

import jaxft
from jaxft.demo.cases import ask
from jaxft.demo.complaints import NAMES
from jaxft.demo.data import HELD_OUT_CASES, TRAIN_CASES, write_task
from jaxft.demo.runs import load_run
from jaxft.errors import JaxftError
from jaxft.programs.evaluation import Evaluation
from jaxft.reporting.intervals import proportion

FOLDER = Path("runs/demo")
MAX_NEW_TOKENS = 12
ADAPTER_RANK = 4
QUESTIONS = (
    "I had a bad fall, and now I limp.",
    "Oh no, my angina is back.",
    "There are hives all over me.",
)
"""None of them is in the training cases, nor is the complaint. They end as all cases do."""

_console = Console(highlight=False)


def main() -> None:
    """Runs the demo in the current folder, the root of a checkout."""
    start = time.monotonic()
    config = load_run("demo")
    _console.print(
        "[bold]jaxft demo[/]: a small Llama learns which clinic department treats a complaint.\n"
        f"{TRAIN_CASES} training cases; {HELD_OUT_CASES} held-out cases in wordings that never "
        f"occur in training; {len(NAMES)} departments."
    )
    write_task(FOLDER / "data")

    _heading("1. The base model before training")
    before = jaxft.evaluate(config)
    _heading("2. Training")
    run = jaxft.train(config, overwrite=True)
    if run.exit_code:
        sys.exit(run.exit_code)
    _heading("3. The model after training")
    after = jaxft.evaluate(config, checkpoint=run.checkpoint)
    _console.print(results_table(before, after))
    _heading("4. Export to a Hugging Face folder, loaded again")
    exported = jaxft.export(run.checkpoint, FOLDER / "model", overwrite=True)
    _ask(exported)
    _heading("5. The same task learnt by an adapter, while the model stays as it is")
    adapter = _learn_adapter()

    _console.print(
        f"\nThe model is in [bold]{exported}[/], the run's curves in "
        f"[bold]{Path(run.workdir) / 'report.html'}[/], the adapter in [bold]{adapter}[/].\n"
        f"All of it took [bold]{time.monotonic() - start:.0f} s[/], every figure above included."
    )


def _learn_adapter() -> Path:
    """Trains low-rank adapters in one pass over the data; returns the exported folder."""
    config = load_run("demo")
    config.adapter.rank = ADAPTER_RANK
    config.optim.learning_rate = 5e-3
    config.train.epochs = 1
    config.train.workdir = str(FOLDER / "adapter-run")
    config.eval.retention = ""
    config.eval.samples = 0
    answers, config.eval.answers = config.eval.answers, "none"  # counted once, at the end
    run = jaxft.train(config, overwrite=True)
    if run.exit_code:
        sys.exit(run.exit_code)
    config.eval.answers = answers
    found = jaxft.evaluate(config, checkpoint=run.checkpoint)["validation"]
    folder = jaxft.export(run.checkpoint, FOLDER / "adapter", overwrite=True)
    size = (folder / "adapter_model.safetensors").stat().st_size
    _console.print(
        f"An adapter of [bold]{size / 1000:.0f} kB[/] gets {_accuracy(found)} right, "
        f"in half the passes over the data."
    )
    return folder


def results_table(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> Table:
    """Returns what two evaluations measured, side by side, with 95 % intervals where known."""
    table = Table(title="Measured in this run", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, data, show in (
        ("held-out label accuracy", "validation", _accuracy),
        ("held-out loss", "validation", _loss),
        ("retention: loss elsewhere", "retention", _loss),
    ):
        table.add_row(name, show(before[data]), show(after[data]))
    table.caption = (
        f"Loss in nats per token; 95 % intervals. Guessing gets {1 / len(NAMES):.1%} right."
    )
    return table


def _accuracy(evaluation: Evaluation) -> str:
    accuracy = evaluation.answers.accuracy if evaluation.answers else proportion(0, 0)
    return f"{accuracy.value:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}]"


def _loss(evaluation: Evaluation) -> str:
    loss = evaluation.sums.loss
    return f"{loss.value:.3f} [{loss.low:.3f}, {loss.high:.3f}]"


def _ask(folder: Path) -> None:
    model = jaxft.load(folder)
    prompts = [[{"role": "user", "content": ask(question)}] for question in QUESTIONS]
    answers = model.generate(prompts, max_new_tokens=MAX_NEW_TOKENS)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        _console.print(f"  {question}", markup=False)
        _console.print(f"  [green]→ {answer}[/]")


def _heading(text: str) -> None:
    _console.print(f"\n[bold cyan]{text}[/]")


if __name__ == "__main__":
    try:
        main()
    except JaxftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)

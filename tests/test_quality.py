"""Fine-tuning real weights on real data gives the losses that PyTorch measured."""

import os
import subprocess
import sys

import pytest

import jaxft
from benchmarks import quality
from jaxft.hardware import huge_pages

NAMES = ["tinyshakespeare", "rasbt-instruct", "banking77"]


def task_of(shared, name: str) -> quality.Task:
    return next(task for task in quality.tasks(shared) if task.name == name)


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("name", NAMES)
def test_the_pre_trained_loss_is_the_reference_implementations(shared, tmp_path, name):
    task = task_of(shared, name)
    config = quality.make_config(task, shared, tmp_path, packing="stream")
    before = quality.loss_of_full_blocks(jaxft.evaluate(config)["validation"].sums)
    assert abs(before - task.before) < quality.BEFORE_TOLERANCE


def run_benchmark(module: str, *arguments: object) -> str:
    """Runs one in a process of its own and returns its lines.

    Much is computed, which the tests' own settings slow down.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    environment[huge_pages.VARIABLE] = f"{huge_pages.SETTING}=1"
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.real_data(seconds=120)
def test_the_fine_tuned_loss_is_the_reference_implementations(shared):
    lines = run_benchmark("quality", shared, "--data=tinyshakespeare", "--packing=stream")
    assert '"data": "tinyshakespeare"' in lines


@pytest.mark.real_data(seconds=60)
def test_adapters_learn_beside_quantised_weights_what_they_learn_beside_exact_ones(shared):
    lines = run_benchmark("quantised_losses", shared, "--kinds=nf4")
    assert lines.count('"quantise"') == 2


@pytest.mark.real_data(seconds=60)
def test_products_of_8_bit_numbers_teach_what_whole_ones_do(shared):
    lines = run_benchmark("matmul_losses", shared, "--kinds=int8", "--steps=60")
    assert lines.count('"matmul"') == 2

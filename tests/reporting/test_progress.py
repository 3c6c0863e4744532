import io
import time

import pytest
from rich.console import Console

from jaxft import console
from jaxft.reporting import progress
from jaxft.reporting.progress import TrainProgress


@pytest.fixture
def screen(monkeypatch):
    def use(**options):
        shown = Console(file=io.StringIO(), width=100, highlight=False, **options)
        monkeypatch.setattr(console, "stderr", shown)
        return shown

    return use


def _lines(shown):
    return shown.file.getvalue().splitlines()


def test_phases_off_a_terminal_say_when_they_begin_and_how_long_they_took(screen):
    shown = screen()
    with console.phase("Loading weights") as outer:
        assert _lines(shown) == ["Loading weights …"]
        with console.phase("Reading"):
            time.sleep(0.11)
        outer.detail("12 tensors")
    assert _lines(shown)[1:] == [
        "  Reading …",
        "  ✓ Reading  0.1 s",
        "✓ Loading weights  0.1 s  12 tensors",
    ]


def test_a_failed_phase_is_marked_and_the_error_passes(screen):
    shown = screen()
    with pytest.raises(ValueError, match="x"), console.phase("Saving"):
        raise ValueError("x")
    assert _lines(shown)[-1] == "✗ Saving  0.0 s"
    with console.phase("Next"):
        pass
    assert _lines(shown)[-1] == "✓ Next  0.0 s"  # not indented: the failed one is over


def test_records_off_a_terminal_are_one_plain_line_each(screen):
    shown = screen()
    console.log("x" * 300)
    with TrainProgress(1200, 0) as bar:
        for step in (1, 2, 3):
            bar.update(step)
        bar.write({"step": 3, "loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.412, "tokens": 9})
    long, line = _lines(shown)
    assert long == "x" * 300  # not wrapped: a log is searched by line
    assert line.startswith("step 3/1,200  loss 2.5000  12,346 tokens/s  MFU 41.2 %  eta ")


def test_a_terminal_shows_the_bar_and_lines_above_it(screen):
    shown = screen(force_terminal=True, force_interactive=True)
    with TrainProgress(400, 100) as bar:
        for step in (101, 102):
            bar.update(step)
        bar.write({"step": 102, "loss": 2.0, "tokens_per_second": 10.0})
        console.log("validation [b]loss[/b] 1.0")
        with console.phase("Evaluating"):
            pass
    text = shown.file.getvalue()
    assert "102/400" in text
    assert "25 %" in text
    assert "loss 2.0000" in text
    assert "validation [b]loss[/b] 1.0" in text  # data is no markup
    assert "✓" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_bar_fits_any_width_on_one_line(screen, width):
    shown = screen()
    bar = TrainProgress(123_456, 0)
    bar.update(1)
    bar.update(2)
    bar._record = {"loss": 2.0, "tokens_per_second": 123456.0, "mfu": 0.4}
    rows = shown.render_lines(bar, shown.options.update(width=width))
    assert len(rows) == 1


def test_time_left_ignores_the_first_step_which_compiles(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    next(clock)
    bar = TrainProgress(60, 50)
    assert bar.eta() is None
    bar.update(51)
    assert bar.eta() is None
    bar.update(52)
    bar.update(53)
    assert bar.eta() == pytest.approx(2.0 * 7)


def test_a_quiet_process_prints_nothing(screen):
    shown = screen(quiet=True)
    with console.phase("Loading"), TrainProgress(10) as bar:
        bar.update(1)
        bar.write({"step": 1, "loss": 1.0})
        console.log("hello")
    assert shown.file.getvalue() == ""


def test_a_record_of_preferences_shows_accuracy_and_margin():
    record = {"step": 5, "loss": 0.65, "margin": 0.125, "accuracy": 0.712, "kl": 0.1, "mfu": 0.4}
    shown = ["loss 0.6500", "accuracy 71.2 %", "margin 0.125", "MFU 40.0 %"]
    assert progress.format_record(record) == shown


def test_figures_that_are_null_are_shown_as_nan():
    assert progress.format_record({"loss": None}) == ["loss nan"]

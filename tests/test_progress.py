import io
import time

import pytest
from rich.console import Console

from jaxft import progress


@pytest.fixture
def screen(monkeypatch):
    def use(**options):
        console = Console(file=io.StringIO(), width=100, highlight=False, **options)
        monkeypatch.setattr(progress, "console", console)
        return console

    return use


def _lines(console):
    return console.file.getvalue().splitlines()


def test_phases_off_a_terminal_say_when_they_begin_and_how_long_they_took(screen):
    console = screen()
    with progress.phase("Loading weights") as outer:
        assert _lines(console) == ["Loading weights …"]
        with progress.phase("Reading"):
            time.sleep(0.11)
        outer.detail("12 tensors")
    assert _lines(console)[1:] == [
        "  Reading …",
        "  ✓ Reading  0.1 s",
        "✓ Loading weights  0.1 s  12 tensors",
    ]


def test_a_failed_phase_is_marked_and_the_error_passes(screen):
    console = screen()
    with pytest.raises(ValueError, match="x"), progress.phase("Saving"):
        raise ValueError("x")
    assert _lines(console)[-1] == "✗ Saving  0.0 s"
    with progress.phase("Next"):
        pass
    assert _lines(console)[-1] == "✓ Next  0.0 s"  # not indented: the failed one is over


def test_records_off_a_terminal_are_one_plain_line_each(screen):
    console = screen()
    progress.log("x" * 300)
    with progress.TrainProgress(1200, 0) as bar:
        for step in (1, 2, 3):
            bar.update(step)
        bar.write({"step": 3, "loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.412, "tokens": 9})
    long, line = _lines(console)
    assert long == "x" * 300  # not wrapped: a log is searched by line
    assert line.startswith("step 3/1,200  loss 2.5000  12,346 tokens/s  MFU 41.2 %  eta ")


def test_a_terminal_shows_the_bar_and_lines_above_it(screen):
    console = screen(force_terminal=True, force_interactive=True)
    with progress.TrainProgress(400, 100) as bar:
        for step in (101, 102):
            bar.update(step)
        bar.write({"step": 102, "loss": 2.0, "tokens_per_second": 10.0})
        progress.log("validation [b]loss[/b] 1.0")
        with progress.phase("Evaluating"):
            pass
    text = console.file.getvalue()
    assert "102/400" in text
    assert "25 %" in text
    assert "loss 2.0000" in text
    assert "validation [b]loss[/b] 1.0" in text  # data is no markup
    assert "✓" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_bar_fits_any_width_on_one_line(screen, width):
    console = screen()
    bar = progress.TrainProgress(123_456, 0)
    bar.update(1)
    bar.update(2)
    bar._record = {"loss": 2.0, "tokens_per_second": 123456.0, "mfu": 0.4}
    rows = console.render_lines(bar, console.options.update(width=width))
    assert len(rows) == 1


def test_time_left_ignores_the_first_step_which_compiles(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    next(clock)
    bar = progress.TrainProgress(60, 50)
    assert bar.eta() is None
    bar.update(51)
    assert bar.eta() is None
    bar.update(52)
    bar.update(53)
    assert bar.eta() == pytest.approx(2.0 * 7)


def test_a_quiet_process_prints_nothing(screen):
    console = screen(quiet=True)
    with progress.phase("Loading"), progress.TrainProgress(10) as bar:
        bar.update(1)
        bar.write({"step": 1, "loss": 1.0})
        progress.log("hello")
    assert console.file.getvalue() == ""


def test_figures_that_are_null_are_shown_as_nan():
    assert progress.format_record({"loss": None}) == ["loss nan"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1:00"),
     (3599.7, "1:00:00"), (3723, "1:02:03")],
)  # fmt: skip
def test_durations_are_short(seconds, text):
    assert progress.format_duration(seconds) == text

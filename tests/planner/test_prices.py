"""Prices of chips: the table that comes with jaxft, and a user's own."""

import tomllib
from datetime import date
from importlib import resources
from pathlib import Path

import pytest

from jaxft.errors import ConfigError
from jaxft.hardware.chips import chip_named
from jaxft.planner.prices import Price, read_prices

SHIPPED = tomllib.loads(resources.files("jaxft.planner").joinpath("prices.toml").read_text("utf-8"))


def write(folder: Path, text: str) -> str:
    file = folder / "prices.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def problems_of(file: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_prices(file)
    assert all(f"--prices={file}" in problem for problem in caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize("name", list(SHIPPED["chips"]))
def test_each_price_that_is_shipped_is_of_a_known_chip_and_says_when_and_where(name):
    chip = chip_named(name)
    assert chip is not None and chip.network is not None
    found = read_prices().of(name)
    assert found is not None
    assert found.per_chip_hour == SHIPPED["chips"][name]["per_chip_hour"] > 0
    assert date.fromisoformat(found.date) >= date(2026, 1, 1)
    assert found.source


def test_all_that_is_shipped_is_read():
    found = read_prices()
    assert found.currency == "USD"
    assert list(found.chips) == list(SHIPPED["chips"])
    assert found.of("v4i") is None and found.of("no-such-chip") is None


@pytest.mark.parametrize("name", list(SHIPPED["chips"]))
def test_as_v2_and_the_like_name_an_entry_that_has_a_source(name):
    source = SHIPPED["chips"][name]["source"]
    if source.startswith("as "):
        assert not SHIPPED["chips"][source.removeprefix("as ")]["source"].startswith("as ")


def test_a_users_file_replaces_the_table(tmp_path):
    file = write(
        tmp_path,
        """\
currency = "EUR"
[chips.v5e]
per_chip_hour = 1
date = 2031-02-03
source = "our contract"
[chips.h100]
per_chip_hour = 2.5
date = "spring"
[chips.v6e]
per_chip_hour = 0
""",
    )
    found = read_prices(file)
    assert found.currency == "EUR"
    assert found.chips == {
        "v5e": Price(1.0, "2031-02-03", "our contract"),
        "h100": Price(2.5, "spring", ""),
        "v6e": Price(0.0, "", ""),
    }
    assert found.of("v5p") is None  # that of the table that comes with jaxft is gone


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    file = write(
        tmp_path,
        """\
[chips.v5ee]
per_chip_hour = 1.0
[chips.v4]
per_chip_hour = "dear"
[chips.v5p]
hour = 3
[chips.v6e]
per_chip_hour = -1
[chips.h100]
per_chip_hour = true
[chips.h200]
per_chip_hour = nan
[chips.b200]
per_chip_hour = inf
[chips]
a100 = 3.0
v5e.per_chip_hour = 1.0
""",
    )
    found = problems_of(file)
    assert f"--prices={file}: no chip 'v5ee' is known. Did you mean 'v5e'?" in found
    for name, value in (
        ("v4", "'dear'"),
        ("v5p", "None"),
        ("v6e", "-1"),
        ("h100", "True"),
        ("h200", "nan"),
        ("b200", "inf"),
        ("a100", "None"),
    ):
        words = f"chips.{name}.per_chip_hour is {value}; expected a number."
        assert f"--prices={file}: {words}" in found
    assert len(found) == 8


@pytest.mark.parametrize("text", ["", "currency = 'USD'", "[chips]", "chips = 3"])
def test_a_file_without_prices_is_refused(tmp_path, text):
    [problem] = problems_of(write(tmp_path, text))
    assert "has no table [chips.NAME] with per_chip_hour" in problem


def test_a_missing_file_is_named(tmp_path):
    [problem] = problems_of(str(tmp_path / "none.toml"))
    assert "cannot be read: No such file or directory" in problem
    [problem] = problems_of(str(tmp_path))
    assert "cannot be read: Is a directory" in problem


def test_what_is_no_toml_is_told_with_the_line(tmp_path):
    [problem] = problems_of(write(tmp_path, "currency = 'USD'\nv5e: 1.2\n"))
    assert "is no TOML" in problem and "line 2" in problem
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    [problem] = problems_of(str(tmp_path / "binary"))
    assert "is no TOML" in problem

"""Commands that compute on CPU start again with huge pages."""

import os
import sys

import pytest

from jaxft.cli import main
from jaxft.hardware import huge_pages


class StartedAgain(Exception):
    """In place of a process that is replaced."""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What a process is replaced by, on Linux whose kernel gives huge pages to who asks."""
    found = []

    def execve(path, arguments, environment):
        found.append((path, arguments, environment))
        raise StartedAgain

    kernel = tmp_path / "enabled"
    kernel.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_KERNEL", kernel)
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    return found


def test_the_same_command_is_started_with_the_setting_beside_those_of_the_user(
    started, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["jaxft", "train", "--help"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "jaxft", "train", "--help"])
    monkeypatch.setenv(huge_pages.VARIABLE, "glibc.malloc.check=1")
    with pytest.raises(StartedAgain):
        main()
    [(path, arguments, environment)] = started
    assert (path, arguments) == (sys.executable, [sys.executable, "-m", "jaxft", "train", "--help"])
    assert environment == {
        **os.environ,
        huge_pages.VARIABLE: "glibc.malloc.check=1:glibc.malloc.hugetlb=1",
    }


@pytest.mark.parametrize("command", ["data", "--help"])
def test_commands_that_compute_little_go_on_as_they_are(started, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["jaxft", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    assert not started


@pytest.mark.parametrize("chosen", ["0", "1", "2"])
def test_what_the_user_chose_stays(started, monkeypatch, chosen):
    monkeypatch.setenv(huge_pages.VARIABLE, f"glibc.malloc.hugetlb={chosen}")
    huge_pages.start_again_with_them()
    assert not started
    assert huge_pages.are_in_use() == (chosen == "1")


@pytest.mark.parametrize("kernel", ["always madvise [never]\n", "[always] madvise never\n", None])
def test_nothing_starts_again_where_the_kernel_does_not_ask_for_it(started, kernel):
    file = huge_pages._KERNEL
    file.unlink() if kernel is None else file.write_text(kernel)
    huge_pages.start_again_with_them()
    assert not started


def test_a_system_that_refuses_leaves_the_process_as_it_is(started, monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "execve", refused)
    huge_pages.start_again_with_them()

"""Processes that check, and how many of them there are."""

import subprocess
import threading

import pytest

from jaxft.service import checker
from jaxft.service.checker import Checker, Checkers
from jaxft.service.target import Target

CPU = Target("cpu", "cpu", 1, 0, "")


class Stub:
    """A checker that answers once it may."""

    all: list["Stub"]

    def __init__(self, target: Target):
        assert target is CPU
        self.may_answer, self.begun = threading.Event(), threading.Event()
        self.is_stopped = self.is_given_up = False
        self.all.append(self)

    def check(self, request: dict) -> dict:
        self.begun.set()
        assert self.may_answer.wait(20)
        return request

    def stop(self) -> None:
        self.is_stopped = True

    def give_up(self) -> None:
        self.is_given_up = True
        self.may_answer.set()


@pytest.fixture
def checkers(monkeypatch: pytest.MonkeyPatch) -> Checkers:
    monkeypatch.setattr(Stub, "all", [], raising=False)
    monkeypatch.setattr(checker, "Checker", Stub)
    return Checkers(lambda: CPU)


def begin(checkers: Checkers, name: str) -> threading.Thread:
    thread = threading.Thread(target=checkers.check, args=(name, {}))
    thread.start()
    return thread


def test_one_process_is_kept_and_others_end_with_their_check(checkers: Checkers):
    threads = [begin(checkers, name) for name in "abc"]
    while len(Stub.all) < 3:
        threads[0].join(0.01)
    for stub in Stub.all:
        stub.may_answer.set()
    for thread in threads:
        thread.join()
    assert sorted(stub.is_stopped for stub in Stub.all) == [False, True, True]
    [kept] = [stub for stub in Stub.all if not stub.is_stopped]
    kept.begun.clear()
    begin(checkers, "d").join()
    assert len(Stub.all) == 3 and kept.begun.is_set()


def test_the_check_that_nobody_waits_for_ends_and_no_other(checkers: Checkers):
    first = begin(checkers, "a")
    while not (Stub.all and Stub.all[0].begun.wait(0.01)):
        pass
    second = begin(checkers, "b")
    checkers.give_up("a")
    first.join(20)
    checkers.give_up("a")  # it is over
    checkers.give_up("none")
    assert not first.is_alive() and second.is_alive()
    checkers.close()
    second.join(20)
    assert not second.is_alive()
    checkers.check("c", {})  # closed before it begins


def test_a_check_that_is_given_up_as_it_ends_ends_no_other(monkeypatch: pytest.MonkeyPatch):
    class Answering(Checker):
        def _ask(self, request: str) -> str:
            return request + "\n"

        def check(self, request: dict) -> dict:
            found = super().check(request)
            checkers.give_up("a")  # it has its answer, and is still known
            return found

    monkeypatch.setattr(checker, "Checker", Answering)
    checkers = Checkers(lambda: CPU)
    for name in "ab":
        assert checkers.check(name, {"name": name}) == {"name": name}


def test_a_job_that_comes_back_while_its_check_is_under_way_is_checked_again(checkers: Checkers):
    """As its lease passes to another worker and back."""
    threads = [begin(checkers, "a") for _ in range(2)]
    while len(Stub.all) < 2:
        threads[0].join(0.01)
    checkers.give_up("a")
    for thread in threads:
        thread.join(20)
    assert all(stub.is_given_up and stub.is_stopped for stub in Stub.all)


def test_a_check_that_is_given_up_as_its_process_starts_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
):
    class Starting(Checker):
        def _started(self) -> subprocess.Popen[str]:
            self.give_up()
            return super()._started()

    popen = subprocess.Popen  # of a process that answers with what it is asked
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen(["cat"], **options))
    assert Starting(CPU).check({})["error"]["code"] == "check_failed"

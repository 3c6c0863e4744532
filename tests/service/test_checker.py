"""Processes that check, and how many of them there are."""

import threading

import pytest

from jaxft.service import checker
from jaxft.service.checker import Checkers
from jaxft.service.target import Target

CPU = Target("cpu", "cpu", 1, 0, "")


class Stub:
    """A checker that answers once it may."""

    all: list["Stub"]

    def __init__(self, target: Target):
        assert target is CPU
        self.may_answer, self.begun, self.is_stopped = threading.Event(), threading.Event(), False
        self.all.append(self)

    def check(self, request: dict) -> dict:
        self.begun.set()
        assert self.may_answer.wait(20)
        return request

    def stop(self) -> None:
        self.is_stopped = True

    def give_up(self) -> None:
        self.may_answer.set()

    close = give_up


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

"""How often a scheduler is asked about jobs that are looked at all the time."""

import pytest

from jaxft.service.executors import ExecutorError, listing
from jaxft.service.executors.listing import Listing


def test_one_answer_serves_for_a_while(monkeypatch):
    now, asked = [100.0], []
    monkeypatch.setattr(listing.time, "monotonic", lambda: now[0])

    def ask() -> int:
        asked.append(now[0])
        if len(asked) == 3:
            raise ExecutorError("down")
        return len(asked)

    jobs = Listing(ask)
    assert [jobs.recent(), jobs.recent()] == [1, 1]
    now[0] += listing.AGE
    assert jobs.recent() == 2
    # One that does not answer is left alone for as long, too.
    for _ in range(2):
        with pytest.raises(ExecutorError, match="down"):
            jobs.new() if len(asked) == 2 else jobs.recent()
    assert len(asked) == 3
    jobs.forget()
    assert [jobs.recent(), jobs.new()] == [4, 5]

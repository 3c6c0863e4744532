"""Runs of a tiny model, as the tests of programs share them."""

import pytest

from tests.tiny_run import tiny_config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Model and data that the runs of this file share."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def config(home, tmp_path):
    """Makes configs whose workdir is the test's own."""

    def make(name="run", **changes):
        config = tiny_config(home, **changes)
        config.train.workdir = str(tmp_path / name)
        return config

    return make

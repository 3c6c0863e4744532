"""What every test shares: eight CPU devices, strict shapes, the optional folder of real data."""

import os
import re
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Little is computed and much compiled: unoptimised code takes a third less time in all.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# A solver of LAPACK starts threads for matrices of 32 columns: those of eight devices then wait for
# each other, and a step of 0.2 s of layers with a delta rule takes 2 to 7 s of a core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Compiling for TPUs that are not there: without questions to a TPU's host, in several processes.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where tests that start runs keep compiled programs: what several compile, in several processes,
# is compiled once. Half of a tiny run's time is compiling.
if "JAXFT_TEST_PROGRAMS" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="jaxft_programs_")  # gone with this process
    os.environ["JAXFT_TEST_PROGRAMS"] = _programs.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis
import jax
import pytest

# How long an example takes says nothing on a machine that does other work.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with what takes longest, so that it does not run alone at the end.

    Of a test that is slow but for some cases these stay in the default suite.
    """
    for item in items:
        case = item.name.partition("[")[2].removesuffix("]")
        for mark in item.iter_markers("slow"):
            if case and (but := mark.kwargs.get("but")) and re.search(but, case):
                item.own_markers.remove(mark)

    def seconds(item: pytest.Item) -> float:
        return max((mark.kwargs.get("seconds", 0) for mark in item.iter_markers()), default=0)

    items.sort(key=seconds, reverse=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, data and tokenizers beside a developer's checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared with real models, data and tokenizers")
    return folder

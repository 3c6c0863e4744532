"""The generator as a process: started when it is needed, again if it dies, and ended in time."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from jaxft.service.errors import ApiError
from jaxft.service.generator.client import Generator
from jaxft.service.generator.protocol import Generate, Prompt
from jaxft.service.generator.running import _watch
from tests.tiny_run import write_base


@pytest.mark.slow(seconds=2)
def test_the_server_s_side_imports_no_jax():
    code = (
        "import sys, jaxft.service.completions\n"
        "print([name for name in ('jax', 'numpy', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow(seconds=15)
def test_a_process_is_there_when_it_is_needed_and_gone_when_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # compiled programs are kept there
    base = write_base(tmp_path / "base")
    folder = tmp_path / ("deep" * 30)  # whose socket would have too long a path

    def asked(**changes):
        ask = {"path": str(base), "prompts": [Prompt(text="abc")], "temperature": 0.0}
        return Generate(**ask | changes)

    async def text(generator, **changes):
        lines = [line async for line in generator.generate(asked(**changes))]
        return "".join(line.get("text", "") for line in lines)

    async def work():
        log = tmp_path / "log.txt"
        generator = Generator(folder / "g.sock", log=log, options={"rows": "1"})
        assert generator.pid == 0 and await generator.status() is None
        first = await text(generator, max_tokens=5)
        assert len(first) == 5 and (await generator.status())["models"] == [str(base)]
        lines, killed = generator.generate(asked(n=128, max_tokens=100)), generator.pid
        await anext(lines)
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(ApiError) as caught:
            async for _ in lines:
                pass
        assert caught.value.status == 503 and caught.value.code == "generator_unavailable"
        assert await text(generator, max_tokens=5) == first
        assert generator.pid not in (0, killed)
        async with contextlib.aclosing(generator.generate(asked(n=128))) as left:
            await anext(left)
            started = time.monotonic()
            os.kill(generator.pid, signal.SIGTERM)
            while generator.pid:
                await asyncio.sleep(0.01)
        assert time.monotonic() - started < 8
        await generator.stop()
        generator.close()
        with pytest.raises(ApiError, match=r"exit code 2.*--rows is 0; expected at least 1"):
            await text(Generator(tmp_path / "g.sock", log=log, options={"rows": "0"}))

    asyncio.run(work())


def test_a_process_that_nobody_needs_ends_itself(monkeypatch):
    def ends(texts=0, last=0.0, idle=0.0, parent=0):
        server = SimpleNamespace(should_exit=False)
        options = SimpleNamespace(idle=idle, parent=parent)
        desk = SimpleNamespace(texts=texts, last=time.monotonic() - last)

        async def watch():
            task = asyncio.ensure_future(_watch(options, desk, server))
            await asyncio.wait((task,), timeout=0.01)
            task.cancel()

        asyncio.run(watch())
        return server.should_exit

    monkeypatch.setattr("jaxft.service.generator.running._SECONDS", 0.001)
    assert ends(last=90, idle=1) and ends(parent=-1)
    assert not ends(last=90, idle=2) and not ends(last=90, idle=1, texts=1)
    assert not ends(last=90) and not ends(parent=os.getppid())

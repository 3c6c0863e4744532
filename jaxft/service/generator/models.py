"""Models that are loaded: on first use, few at a time, adapters beside the model they share."""

import asyncio
import contextlib
import functools
import gc
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxft import console
from jaxft.errors import OutOfMemoryError
from jaxft.hardware.devices import shortage
from jaxft.programs.engine import Engine
from jaxft.programs.model import Model, load_source
from jaxft.programs.side_by_side import SideBySide, load_adapter, reason_apart
from jaxft.programs.texts import NO_COLUMNS, Columns
from jaxft.service.generator.driver import Driver
from jaxft.service.generator.text import Speller
from jaxft.workdir.source import Source, find_source

_SLOTS = 512  # tokens of a row for which there is room at first
_FEW_ROWS = 8  # with which a step takes hardly less time for fewer texts
_MOST_ADAPTERS = 32  # of one model; the least recently used one makes room

_KNOWN_SECONDS = 10

type Key = tuple[Path, int]


@dataclass(eq=False)
class Base:
    """A whole model and its engine.

    Attributes:
      model: The model.
      engine: The engine that continues texts with it.
      adapters: The adapters beside it.
    """

    model: Model
    engine: Engine
    adapters: SideBySide


@dataclass(eq=False)
class Loaded:
    """A model as it can be asked.

    Attributes:
      model: The model, with tokenizer, template and stop tokens of its own.
      base: The whole model whose engine continues its texts.
      columns: The place of the adapter there.
      users: Number of requests that use it.
      turn: Number of the last of them.
    """

    model: Model
    base: Base
    columns: Columns = NO_COLUMNS
    users: int = 0
    turn: int = 0

    @functools.cached_property
    def speller(self) -> Speller:
        """Writes its tokens."""
        return Speller(self.model.tokenizer)


@dataclass
class Models:
    """All that is loaded. Used in one event loop; what takes long is done in threads.

    Attributes:
      driver: The thread of the engines.
      most: Whole models that are held at a time.
      rows: Texts that each of them continues at a time.
      dtypes: Types of weights, the argument of `jaxft.load`.
      quantise: Likewise.
    """

    driver: Driver
    most: int = 4
    rows: int = 32
    dtypes: str = "float32"
    quantise: str = ""
    _loaded: dict[Key, Loaded] = field(default_factory=dict)
    _loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _freed: asyncio.Event = field(default_factory=asyncio.Event)
    _found: dict[tuple[str, str], tuple[Source, float]] = field(default_factory=dict)
    _turns: Any = field(default_factory=lambda: itertools.count(1))
    _loader: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="loader")
    )

    @contextlib.asynccontextmanager
    async def use(self, path: str, step: str) -> AsyncGenerator[Loaded]:
        """Gives a model, loaded if it was not, which stays until the end of the block.

        Raises:
          JaxftError: If it cannot be loaded.
        """
        found = await self._get(await self._find(path, step))
        try:
            yield found
        finally:
            found.users -= 1
            self._freed.set()

    def names(self) -> list[str]:
        """Returns what is loaded, in words."""
        return [loaded.model.source.name for loaded in self._loaded.values()]

    async def _in_loader(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._loader, function)

    async def _find(self, path: str, step: str) -> Source:
        """Returns where a model is, which is looked up anew once in a while: runs go on."""
        found, until = self._found.get((path, step), (None, 0.0))
        if found is None or time.monotonic() > until:
            found = await asyncio.to_thread(find_source, path, step=step)
            self._found[path, step] = found, time.monotonic() + _KNOWN_SECONDS
        return found

    async def _get(self, source: Source) -> Loaded:
        """Returns a model with a further user; one is loaded at a time, those there are at hand."""
        key = _key(source)
        if key not in self._loaded:
            async with self._loading:
                if key not in self._loaded:
                    self._loaded[key] = await self._load(source)
                # No other task has its turn before the model has its user.
                return self._taken(key)
        return self._taken(key)

    def _taken(self, key: Key) -> Loaded:
        found = self._loaded[key]
        found.users += 1
        found.turn = next(self._turns)
        return found

    async def _load(self, source: Source) -> Loaded:
        reason = await self._in_loader(lambda: reason_apart(source)) if source.is_adapter else ""
        if source.is_adapter and not reason:
            assert source.base is not None
            if (beside := await self._load_beside(source, source.base)) is not None:
                return beside
            reason = "it has the model otherwise than it is alone"
        if reason:
            console.log(f"{source.name} gets a copy of its model: {reason}.")
        return await self._load_whole(source)

    async def _load_beside(self, source: Source, of: Source) -> Loaded | None:
        base = self._loaded.get(_key(of))
        if base is None:
            base = self._loaded[_key(of)] = await self._load_whole(of)
        base.users += 1
        try:
            load = functools.partial(load_adapter, source, base.model, dtypes=self.dtypes)
            model = await self._in_loader(load)
            if model is None:
                return None
            while len(beside := self._beside(base.base)) >= _MOST_ADAPTERS:
                await self._let_go(beside)
            columns = await self._change(base.base, lambda side: side.add(model))
            return Loaded(model, base.base, columns)
        finally:
            base.users -= 1
            base.turn = next(self._turns)

    async def _load_whole(self, source: Source) -> Loaded:
        while len(whole := self._whole()) >= self.most:
            await self._let_go(whole)
        while True:
            try:
                return await self._in_loader(lambda: self._read(source))
            except Exception as error:
                short = isinstance(error, OutOfMemoryError) or shortage(error)
                if not short or not any(self._is_idle(one) for one in self._whole()):
                    raise
            await self._let_go(self._whole())
            gc.collect()

    def _read(self, source: Source) -> Loaded:
        model = load_source(source, dtypes=self.dtypes, quantise=self.quantise)
        config, limit = model.architecture.config, model.architecture.config.max_length
        engine = Engine(
            config,
            model.abstract.graphdef,
            model.params,
            rows=self.rows,
            elastic=self.rows > _FEW_ROWS,
            slots=min(_SLOTS, limit),
            has_token=model.has_token,
        )
        return Loaded(model, Base(model, engine, SideBySide(model, dtypes=self.dtypes)))

    async def _change(self, base: Base, change: Callable[[SideBySide], Any]) -> Any:
        """Changes the adapters of a model between two steps of its engine."""

        def between() -> Any:
            side = base.adapters
            found = change(side)
            base.engine.replace(side.graphdef, side.params, columns=side.width)
            return found

        return await asyncio.wrap_future(self.driver.call(between))

    def _whole(self) -> list[Loaded]:
        return [one for one in self._loaded.values() if one.columns == NO_COLUMNS]

    def _beside(self, base: Base) -> list[Loaded]:
        return [one for one in self._loaded.values() if one.base is base and one.columns.number]

    def _is_idle(self, one: Loaded) -> bool:
        beside = [] if one.columns.number else self._beside(one.base)
        return not one.users and not any(other.users for other in beside)

    async def _let_go(self, among: list[Loaded]) -> None:
        """Lets the least recently used one go, as soon as one of them is not in use."""

        def last_use(one: Loaded) -> int:
            beside = [] if one.columns.number else self._beside(one.base)
            return max(other.turn for other in (one, *beside))

        while not any(self._is_idle(one) for one in among):
            self._freed.clear()
            await self._freed.wait()
        gone = min((one for one in among if self._is_idle(one)), key=last_use)
        with_it = [gone] if gone.columns.number else [gone, *self._beside(gone.base)]
        self._loaded = {key: one for key, one in self._loaded.items() if one not in with_it}
        console.log(f"{gone.model.source.name} is let go.")
        if gone.columns.number:
            await self._change(gone.base, lambda side: side.remove(gone.columns))


def _key(source: Source) -> Key:
    """Returns what tells one stored model from another."""
    folder = source.folder if source.checkpoints is None else source.checkpoints
    return folder.resolve(), source.step

"""The schedule of a compiled program, played through on hardware that is not there.

A program is a sequence of instructions in the order in which the compiler scheduled them. The core
runs one after the other; what was started runs beside it on the lane it takes (links between chips,
the way to the host, copies between memories) until the core waits for its end. That is all the
overlap there is: what is not written as a start and an end is waited for at once.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxft.compiled.collectives import Collective, Frame, Reader
from jaxft.compiled.hlo import HOST, Computation, Instruction, Module, arrays
from jaxft.hardware.chips import Chip
from jaxft.planner.cost import MOVES, Cost, cost_of, moved_bytes
from jaxft.planner.network import Network

# What the core does; it waits for what runs on another lane, which the kind then names.
MATMUL, ATTENTION, MEMORY, WAIT = "matmul", "attention", "memory", "wait"
# All of the delta rule, whatever the core does for it.
RECURRENCE = "recurrence"
# Lanes beside the core.
CORE, ICI, DCN, TO_HOST, COPY, SPARSE = "core", "ici", "dcn", "host", "copy", "sparsecore"


class Kernel(NamedTuple):
    """One run of a kernel.

    Attributes:
      kind: Work of the core that it is.
      flops: FLOPs of its products.
      seconds: Time that it takes.
    """

    kind: str
    flops: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Span:
    """Something that takes time on one lane.

    Attributes:
      lane: Resource that is used: core, links, copies, host.
      kind: Work of the core, `wait ici` for a wait; kind of a collective; else the lane's name.
      start: Seconds from the start of the timeline that it is part of.
      seconds: Duration.
      name: The instruction's; of a wait that of what it waits for.
      origin: Part of the traced function that it came from.
    """

    lane: str
    kind: str
    start: float
    seconds: float
    name: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop, which runs the same timeline several times.

    Attributes:
      start: Seconds from the start of the timeline that it is part of.
      trips: Number of runs of its body.
      body: One run.
      origin: Part of the traced function that it came from.
    """

    start: float
    trips: int
    body: "Timeline"
    origin: str = ""


@dataclass(frozen=True)
class Timeline:
    """One run of a computation.

    Attributes:
      seconds: Length.
      spans: Work in time, without what loops contain.
      loops: Loops in order.
    """

    seconds: float = 0.0
    spans: tuple[Span, ...] = ()
    loops: tuple[Loop, ...] = ()

    def every(self, times: int = 1) -> Iterator[tuple[Span, int]]:
        """Yields each span with how often it runs, those in loops included."""
        for span in self.spans:
            yield span, times
        for loop in self.loops:
            yield from loop.body.every(times * loop.trips)

    def total(self, *, lane: str = "", kind: str = "") -> float:
        """Returns the seconds of all spans of a lane or kind, those in loops included."""
        return sum(
            span.seconds * times
            for span, times in self.every()
            if (not lane or span.lane == lane) and (not kind or span.kind == kind)
        )


class Rates(NamedTuple):
    """Shares of published rates that programs reach, measured by others on real hardware.

    Attributes:
      memory: Share of the bandwidth of device memory, by what is no matrix product: 1,060 of 1,640
        GB/s in a profile of a step of Llama-3-8B on v6e-8 (github.com/vlasenkoalexey/
        tpu_performance_autoresearch_wiki, experiment 28b).
      links: Share of the bandwidth between chips, by gathers: 95 % on v5e (scaling book, chapter on
        sharding).
      sums: Share of the bandwidth between chips, by sums: 235.8 of 360 GB/s on v6e-256 (github.com/
        AI-Hypercomputer/tpu-recipes, microbenchmarks/trillium/collectives).
      cycles: Take what the compiler estimates for matrix products where that is more than what
        they take at the rate that large ones reach.
    """

    memory: float = 0.65
    links: float = 0.95
    sums: float = 0.65
    cycles: bool = False


class _Pending(NamedTuple):
    """Something on another lane that is not finished yet."""

    end: float
    lane: str
    name: str


@dataclass
class _State:
    """The state of a simulated run.

    Attributes:
      now: Seconds on the core.
      free: Time at which each lane has done what was given to it.
      ends: Time at which what was started ends, by the name of what started it.
    """

    now: float = 0.0
    free: dict[str, float] = field(default_factory=dict)
    ends: dict[str, _Pending] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)

    def begin(self, lane: str, kind: str, seconds: float, name: str, origin: str) -> "_Pending":
        """Puts something on another lane and returns when it ends."""
        start = max(self.now, self._free(lane))
        self.free[lane] = start + seconds
        shown = lane.split(" ")[0]
        self.spans.append(Span(shown, kind, start, seconds, name, origin))
        return _Pending(start + seconds, shown, name)

    def _free(self, lane: str) -> float:
        """Returns when a lane is free: of links one direction, or all of them, must be."""
        whole = lane.split(" ")[0]
        wide = lane == whole
        ends = (
            end
            for other, end in self.free.items()
            if other in (lane, whole) or (wide and other.split(" ")[0] == whole)
        )
        return max(ends, default=0.0)

    def run(self, kind: str, seconds: float, instruction: Instruction) -> None:
        """Lets the core do something."""
        if seconds:
            self.spans.append(
                Span(CORE, kind, self.now, seconds, instruction.name, instruction.origin)
            )
        self.now += seconds

    def wait(self, pending: "_Pending | None") -> None:
        """Lets the core wait until something ends."""
        if pending is not None and pending.end > self.now:
            waited = pending.end - self.now
            self.spans.append(Span(CORE, f"{WAIT} {pending.lane}", self.now, waited, pending.name))
            self.now = pending.end


class Simulator:
    """Runs a program on paper.

    Args:
      module: The program.
      reader: Reads its collectives.
      network: Between its devices.
      kernels: Says what a kernel is, None for another instruction.
      rates: What share of published rates is reached.
    """

    def __init__(
        self,
        module: Module,
        reader: Reader,
        network: Network,
        *,
        kernels: Callable[[Instruction, Computation], Kernel | None],
        rates: Rates,
    ):
        self.module, self.reader, self.network = module, reader, network
        self.kernels, self.rates = kernels, rates
        self.chip: Chip = network.chip.core

    def run(self) -> Timeline:
        """Returns the timeline of one step."""
        return self._run(self.module.computations[self.module.entry])

    def _run(self, computation: Computation, chains: Iterable[str] = ()) -> Timeline:
        """Runs a computation.

        Args:
          computation: The computation.
          chains: Collectives that began before it.
        """
        state, frame = _State(), Frame(chains=set(chains))
        for instruction in computation.instructions.values():
            self._step(state, frame, computation, instruction)
        return Timeline(
            max([state.now, *state.free.values()]), tuple(state.spans), tuple(state.loops)
        )

    def _step(
        self, state: _State, frame: Frame, computation: Computation, instruction: Instruction
    ) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            self._loop(state, frame, computation, instruction)
        elif opcode == "conditional":
            runs = [
                self._run(self.module.computations[b]) for b in self.module.branches(instruction)
            ]
            for run in runs:  # which one is not in the text: the mean of all
                state.loops.append(Loop(state.now, 1, _scaled(run, 1 / len(runs))))
                state.now += run.seconds / len(runs)
        elif opcode == "call":
            for name in instruction.called("to_apply"):
                run = self._run(self.module.computations[name])
                state.loops.append(Loop(state.now, 1, run))
                state.now += run.seconds
        elif opcode.endswith("-update") and instruction.operands[0] in state.ends:
            state.ends[instruction.name] = state.ends[instruction.operands[0]]
        elif opcode == "recv-done":
            # What comes back was asked for by the send of the same meeting.
            started = computation.instructions.get(instruction.operands[0])
            state.wait(state.ends.get(_meeting(started) if started else ""))
        elif opcode == "send-done":
            pass  # that it has left says nothing of when the answer comes
        elif opcode.endswith("-done"):
            state.wait(state.ends.get(instruction.operands[0]))
        elif (found := next(self.reader.at(computation, instruction, frame), None)) is not None:
            waits = not opcode.endswith("-start") and opcode != "send"
            self._exchange(state, found, instruction, waits=waits)
        elif opcode in MOVES:
            self._move(state, computation, instruction)
        elif opcode in ("async-start", "call-start"):
            self._beside(state, frame, computation, instruction)
        elif opcode == "fusion" and self._has_chain(instruction):
            self._chained(state, frame, computation, instruction)
        else:
            self._compute(state, computation, instruction)

    def _has_chain(self, fusion: Instruction) -> bool:
        body = self.module.fused(fusion)
        return body is not None and any("chain_id" in i.rest for i in body.instructions.values())

    def _loop(
        self, state: _State, frame: Frame, computation: Computation, loop: Instruction
    ) -> None:
        [name] = loop.called("body")
        trips = self.module.trips(computation, loop)
        trips = 1 if trips is None else trips  # the plan says so
        body = self._run(self.module.computations[name], frame.chains)
        state.loops.append(Loop(state.now, trips, body, loop.origin))
        state.now += trips * body.seconds

    def _exchange(
        self, state: _State, found: Collective, instruction: Instruction, *, waits: bool
    ) -> None:
        end = self._begin(state, found)
        if waits:
            state.wait(end)
        else:
            state.ends[_meeting(instruction) or instruction.name] = end

    def _begin(self, state: _State, found: Collective) -> _Pending:
        lane = DCN if found.across_slices else ICI
        if found.kind == "collective-permute":  # the two directions of a link do not share it
            lane += f" {found.groups[:1]}"
        return state.begin(lane, found.kind, self._exchanged(found), found.name, found.origin)

    def _exchanged(self, found: Collective) -> float:
        summed = found.kind in ("all-reduce", "reduce-scatter") and not found.gathers
        return self.network.seconds(found) / (self.rates.sums if summed else self.rates.links)

    def _chained(
        self, state: _State, frame: Frame, computation: Computation, instruction: Instruction
    ) -> None:
        """Runs a fusion that begins, carries on or ends a collective beside its own work."""
        body = self.module.fused(instruction)
        assert body is not None
        inner = Frame(fused=True, chains=frame.chains)
        kinds = {i.target for i in body.instructions.values() if i.opcode == "custom-call"}
        for part in body.instructions.values():
            chain = re.search(r'\bchain_id="(\d+)"', part.rest)
            for found in self.reader.at(body, part, inner):
                state.ends[f"chain {chain[1] if chain else ''}"] = self._begin(state, found)
        self._compute(state, computation, instruction)
        if "AsyncCollectiveDone" in kinds:
            for part in body.instructions.values():
                if chain := re.search(r'\bchain_id="(\d+)"', part.rest):
                    state.wait(state.ends.get(f"chain {chain[1]}"))

    def _move(self, state: _State, computation: Computation, instruction: Instruction) -> None:
        """Starts a copy between memories."""
        size, places = moved_bytes(instruction), [a.space for a in arrays(instruction.shape)]
        lane, kind, seconds = COPY, COPY, self._moving(size)
        if HOST in places:
            # Of a copy the result comes first, of a slice or an update before the last.
            result = places[0] if instruction.opcode == "copy-start" else places[-2]
            lane, kind = f"{TO_HOST} {'out' if result == HOST else 'in'}", TO_HOST
            seconds = size / self.chip.host if self.chip.host else 0.0
        state.ends[instruction.name] = state.begin(
            lane, kind, seconds, instruction.name, instruction.origin
        )

    def _beside(
        self, state: _State, frame: Frame, computation: Computation, instruction: Instruction
    ) -> None:
        """Starts what runs apart from the core: collectives and copies that SparseCores make."""
        names = instruction.called("to_apply") or instruction.called("calls")
        end = _Pending(state.now, SPARSE, instruction.name)
        for body in (self.module.computations[name] for name in names):
            for part in body.instructions.values():
                found = next(self.reader.at(body, part, frame), None)
                if found is not None:
                    end = self._begin(state, found)
                elif seconds := self._moving(cost_of(self.module, body, part).bytes):
                    end = state.begin(SPARSE, SPARSE, seconds, part.name, part.origin)
        state.ends[instruction.name] = end

    def _compute(self, state: _State, computation: Computation, instruction: Instruction) -> None:
        if instruction.opcode == "custom-call":
            kernel = self.kernels(instruction, computation)
            if kernel is not None:
                state.run(kernel.kind, kernel.seconds, instruction)
                return
        cost = cost_of(self.module, computation, instruction)
        kind = MATMUL if cost.flops else MEMORY
        state.run(kind, self._seconds(cost), instruction)

    def _moving(self, size: float) -> float:
        bandwidth = self.chip.bandwidth * self.rates.memory
        return size / bandwidth if bandwidth else 0.0

    def _seconds(self, cost: Cost) -> float:
        memory = self._moving(cost.bytes)
        if not cost.flops or not self.chip.bfloat16:
            return memory
        rate = self.chip.peak(cost.dtype)
        if cost.passes > 1:
            rate = rate / cost.passes if self.chip.is_tpu else self.chip.exact
        products = cost.flops / (rate * self.chip.product_share)
        cycles = self.rates.cycles and self.chip.clock and cost.cycles / self.chip.clock
        return max(memory, products, cycles)


def _meeting(instruction: Instruction) -> str:
    """Returns what names both ends of a transfer between slices; empty for anything else."""
    if instruction.opcode not in ("send", "recv"):
        return ""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.rest)
    channel = re.search(r"\bchannel_id=(\d+)", instruction.rest)
    return found[1] if found else f"channel {channel[1]}" if channel else ""


def _scaled(timeline: Timeline, share: float) -> Timeline:
    return Timeline(
        timeline.seconds * share,
        tuple(
            Span(s.lane, s.kind, s.start * share, s.seconds * share, s.name, s.origin)
            for s in timeline.spans
        ),
        tuple(
            Loop(x.start * share, x.trips, _scaled(x.body, share), x.origin) for x in timeline.loops
        ),
    )

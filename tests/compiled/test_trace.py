"""Operations of a trace, of planes as CPU, GPU and TPU have them."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from jaxft.compiled.trace import operations

TEXT = """HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%body (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%p, %p), metadata={op_name="ORIGIN"}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %add.2 = f32[8,4]{1,0} add(%x, %x), metadata={op_name="jit(step)/add"}
  ROOT %while.3 = f32[8,4]{1,0} while(%add.2), condition=%cond, body=%body
}
""".replace("ORIGIN", "jit(step)/transpose(jvp())/while/body/bt,td->bd/dot_general")
MS = 10**9  # picoseconds


def trace(*planes):
    """Makes a trace of `(plane, {line: [(event, start, milliseconds, tags)]})`."""
    return ProfileData.from_text_proto("\n".join(_plane(*plane) for plane in planes))


def _plane(name, lines):
    keys, names, parts = {}, {}, []
    for number, (line, events) in enumerate(lines.items()):
        shown = []
        for event, start, duration, tags in events:
            stats = "".join(
                f"stats {{ metadata_id: {keys.setdefault(key, len(keys) + 1)} "
                + (f"int64_value: {value}" if isinstance(value, int) else f'str_value: "{value}"')
                + " }"
                for key, value in tags.items()
            )
            shown.append(
                f"events {{ metadata_id: {names.setdefault(event, len(names) + 1)} "
                f"offset_ps: {start * MS} duration_ps: {duration * MS} {stats} }}"
            )
        parts.append(f'lines {{ id: {number} name: "{line}" {" ".join(shown)} }}')
    for field, table in (("event_metadata", names), ("stat_metadata", keys)):
        for key, i in table.items():
            parts.append(f'{field} {{ key: {i} value {{ id: {i} name: "{key}" }} }}')
    return f'planes {{ name: "{name}" {" ".join(parts)} }}'


def tags(name, module="jit_step", **more):
    return {"hlo_op": name, "hlo_module": module, **more}


def rows(found):
    return [(o.name, o.what, o.calls, pytest.approx(o.seconds)) for o in found]


DOT = ("dot.1", "dot f32[8,4], backward: bt,td->bd/dot_general")
ADD = ("add.2", "add f32[8,4]: add")


def test_threads_of_a_cpu_add_up_to_the_mean_of_its_devices():
    found = operations(
        trace(
            (
                "/host:CPU",
                {
                    "a": [
                        ("while.3", 0, 9, tags("while.3", device_ordinal=0)),
                        ("dot.1", 0, 4, tags("dot.1", device_ordinal=0)),
                        ("end: dot.1", 4, 1, {}),
                    ],
                    "b": [
                        ("dot.1", 0, 6, tags("dot.1", device_ordinal=1)),
                        ("add.2", 6, 2, tags("add.2", device_ordinal=1)),
                        ("dot.1", 6, 90, tags("dot.1", "jit_other", device_ordinal=1)),
                    ],
                },
            )
        ),
        TEXT,
    )
    assert rows(found) == [(*DOT, 1.0, 0.005), (*ADD, 0.5, 0.001)]


def test_kernels_of_a_gpu_count_for_their_instruction_and_their_launch_does_not():
    launch = ("/host:CPU", {"python": [("Thunk", 0, 50, tags("dot.1"))]})
    kernels = {
        "Stream #1": [("gemm", 0, 3, tags("dot.1")), ("split_k", 3, 1, tags("dot.1"))],
        "Stream #2": [("fused", 0, 2, tags("unknown.7"))],
    }
    devices = [(f"/device:GPU:{i}", kernels) for i in range(2)]
    found = operations(trace(launch, *devices), TEXT)
    assert rows(found) == [(*DOT, 2.0, 0.004), ("unknown.7", "", 1.0, 0.002)]


def test_instructions_of_a_tpu_count_within_runs_of_the_program():
    lines = {
        "XLA Modules": [("jit_step(12)", 0, 10, {}), ("jit_other(3)", 10, 10, {})],
        "XLA Ops": [
            ("%while.3 = f32[8,4] while(f32[8,4] %add.2)", 0, 9, {}),
            ("%dot.1 = f32[8,4] dot(f32[8,4] %p)", 1, 3, {}),
            ("%dot.1 = f32[8,4] dot(f32[8,4] %p)", 4, 3, {}),
            ("%dot.1 = f32[8,4] dot(f32[8,4] %p)", 11, 30, {}),
        ],
    }
    assert rows(operations(trace(("/device:TPU:0", lines)), TEXT)) == [(*DOT, 2.0, 0.006)]


def test_a_trace_without_the_program_has_no_operations():
    assert operations(trace(("/host:CPU", {"python": [("train", 0, 1, {})]})), TEXT) == []


def test_operations_of_a_program_are_found_in_a_trace_of_it(tmp_path):
    def step(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=5)[0]

    x = jnp.full((64, 64), 0.01)
    compiled = jax.jit(step).lower(x).compile()
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            compiled(x).block_until_ready()
    file = next(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
    found = operations(ProfileData.from_file(str(file)), compiled.as_text())
    products = [o for o in found if "dot_general" in o.what]
    assert [o.calls for o in products] == [15.0]
    assert all(o.what for o in found)
    assert not any(o.what.startswith("while") for o in found)

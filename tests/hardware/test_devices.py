import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxft.hardware.chips import chip_of
from jaxft.hardware.devices import device_memory, host_memory, host_memory_total, peak_flops


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v2", 22.5),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_bfloat16_peak_is_the_published_dense_rate_of_one_device(kind, teraflops):
    assert peak_flops(kind, "bfloat16") == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce GTX 1080", "TPU v9"]
)
def test_unknown_devices_have_no_peak(kind):
    assert peak_flops(kind, "bfloat16") is None
    assert chip_of(kind) is None


def test_float32_peak_follows_the_default_precision_of_jax():
    assert peak_flops("TPU v4", "float32") == peak_flops("TPU v4", "bfloat16")
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") == pytest.approx(494.7e12)
    assert peak_flops("Tesla T4", "float32") == pytest.approx(8.1e12)


def test_peak_takes_types_as_well_as_names():
    expected = peak_flops("TPU v4", "bfloat16")
    assert peak_flops("TPU v4", jnp.bfloat16) == expected
    assert peak_flops("TPU v4", jnp.dtype("bfloat16")) == expected
    assert peak_flops("TPU v4", jnp.int8) is None


def test_cpu_devices_keep_no_account_of_memory():
    assert device_memory(jax.devices("cpu")[0]) is None


def test_host_memory_sees_what_is_allocated_and_keeps_the_peak():
    # In a process of its own: other tests have already set this one's peak.
    code = (
        "from jaxft.hardware.devices import host_memory\n"
        "a = host_memory(); x = bytearray(200 << 20); b = host_memory(); del x; c = host_memory()\n"
        "print(*a, *b, *c)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, _, during, _, after, peak = map(int, re.findall(r"\d+", out.stdout))
    assert 190 << 20 < during - before < 230 << 20
    assert after < during - (150 << 20)
    assert peak >= during - (1 << 20)


def test_host_memory_total_bounds_what_is_resident():
    total = host_memory_total()
    assert total is not None
    assert host_memory().resident < total


def test_the_hosts_memory_is_that_of_the_control_group_a_process_is_in(tmp_path):
    folder = Path("/sys/fs/cgroup/memory/jaxft-test")
    try:
        folder.mkdir(exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(str(2**30))
    except OSError:
        pytest.skip("needs the right to make a control group of memory, version 1")
    code = (
        f"import os; open('{folder}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from jaxft.hardware.devices import host_memory_free, host_memory_total\n"
        "print(host_memory_total(), host_memory_free())"
    )
    try:
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        total, free = map(int, found.stdout.split())
        assert total == 2**30 and 0 < free < total
    finally:
        folder.rmdir()

import dataclasses

import pytest

from jaxft.hardware.chips import chip_named
from jaxft.models import splash


@pytest.mark.parametrize(
    ("chip", "length", "window", "block", "fused"),
    [
        ("v6e", 512, 0, 512, True),
        ("v6e", 4096, 0, 1024, True),
        ("v6e", 8192, 0, 1024, True),
        ("v6e", 16384, 0, 1024, False),  # sixteen copies of the queries
        ("v6e", 8192, 512, 1024, False),  # few pairs, and eight copies all the same
        ("v5e", 4608, 0, 512, False),  # no multiple of the larger block
        ("v5e", 4096, 0, 1024, True),
        ("tpu7x", 4096, 0, 1024, True),
        ("v5p", 4096, 0, 1024, False),
        ("v4", 4096, 0, 1024, False),
        ("", 4096, 0, 1024, False),
    ],
)
def test_blocks_and_kernels_go_by_the_chip_and_the_row(chip, length, window, block, fused):
    sizes = splash._block_sizes(length, length // 4, window, chip_named(chip), 256)
    assert (sizes.block_q, sizes.block_kv) == (min(block, length // 4), block)
    assert sizes.block_kv % sizes.block_kv_compute == 0
    assert sizes.use_fused_bwd_kernel == fused
    assert sizes.has_backward_blocks


@pytest.mark.parametrize("fuses", [True, False])
def test_a_new_chip_says_itself_how_gradients_are_made(fuses):
    known = chip_named("v6e")
    assert known is not None
    chip = dataclasses.replace(known, name="new", fuses=fuses)
    assert splash._block_sizes(4096, 4096, 0, chip, 128).use_fused_bwd_kernel == fuses


def test_wide_heads_are_taken_in_smaller_blocks():
    """As of Gemma 4's layers without a window: the larger ones do not fit a kernel on v5e."""
    sizes = splash._block_sizes(8192, 8192, 0, chip_named("v5e"), 512)
    assert (sizes.block_q, sizes.block_kv) == (512, 512)

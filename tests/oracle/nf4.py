"""Stores what bitsandbytes makes of a weight in NF4.

Run from the project's root by a Python that has torch and bitsandbytes:

  python -m tests.oracle.nf4           writes tests/oracle/nf4.npz
  python -m tests.oracle.nf4 --check   fails where it differs from what is stored
"""

import argparse

import bitsandbytes.functional as bnb
import numpy as np
import torch

from tests.oracle.cases import NF4

_BLOCK = 64


def compute() -> dict[str, np.ndarray]:
    """Returns the table, a weight `[8, 256]`, and its codes, scales and values.

    The largest magnitude of each block is a number of bfloat16, which is how we store scales. One
    block is zero, and one has numbers just beside the middles between levels.
    """
    table = bnb.get_4bit_type("nf4", device="cpu")
    w = torch.randn(8, 256 // _BLOCK, _BLOCK, generator=torch.Generator().manual_seed(0))
    w[0, 1] = 0
    middles = (table[1:] + table[:-1]) / 2
    w[0, 2, :15], w[0, 2, 15:30], w[0, 2, 30:] = middles * (1 - 1e-4), middles * (1 + 1e-4), -1
    largest = w.abs().amax(-1, keepdim=True)
    w = w * (largest.bfloat16().float() / largest.clamp(min=1e-30))
    place = w.abs().argmax(-1, keepdim=True)
    w.scatter_(-1, place, w.gather(-1, place).bfloat16().float())
    packed, state = bnb.quantize_4bit(w.reshape(8, -1), blocksize=_BLOCK, quant_type="nf4")
    pairs = packed.reshape(-1)
    return {
        "table": table.numpy(),
        "w": w.reshape(8, -1).numpy(),
        "codes": torch.stack([pairs >> 4, pairs & 15], -1).reshape(8, -1).numpy(),
        "scales": state.absmax.reshape(8, -1).numpy(),
        "values": bnb.dequantize_4bit(packed, state).numpy(),
    }


def main() -> None:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        np.savez_compressed(NF4, **compute())
        return
    computed = compute()
    with np.load(NF4) as stored:
        differing = [name for name in computed if not np.array_equal(stored[name], computed[name])]
    if differing:
        raise SystemExit(f"{NF4.name}: {', '.join(differing)} differ.")


if __name__ == "__main__":
    main()

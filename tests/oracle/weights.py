"""Weights of tiny test models: a function of the tensor's name and shape, and of nothing else."""

import zlib

import numpy as np


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the float32 tensor that a Hugging Face name stands for in every tiny model.

    Vectors are scales of norms, near 1; matrices `[out, in]` are scaled by 1 / sqrt(in).
    """
    # RandomState's stream is frozen, Generator's is not: the stored numbers outlive NumPy releases.
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(shape)
    scaled = 1 + 0.1 * values if len(shape) == 1 else values / np.sqrt(shape[-1])
    return scaled.astype(np.float32)

"""Weights of tiny test models: a function of the tensor's name and shape and of the family."""

import re
import zlib

import numpy as np

# Tensors that lie inputs first, `[..., in, out]`: GPT-2's and the experts of gpt-oss.
_INPUTS_FIRST = re.compile(r"\.c_(attn|proj|fc)\.weight$|\.experts\.(gate_up|down)_proj$")
# Families that add the scales of norms to 1.
_ADDED_TO_1 = ("gemma2", "gemma3", "qwen3_5", "qwen3_next")

# Other than those that transformers starts from, so that it shows whose are used.
_NUMBERS = {"beta": 0.6, "eps": -0.01}


def weight(name: str, shape: tuple[int, ...], family: str) -> np.ndarray:
    """Returns the float32 tensor that a Hugging Face name stands for in every tiny model.

    Numbers that no model learns are those of xIELU. Biases are a tenth of what they are added to,
    attention sinks of the size of scores; other vectors are scales of norms, near 1 after some
    families' have been added to 1; matrices are scaled by 1 / sqrt(inputs). States fade slowly:
    rates are exp(A_log).
    """
    # RandomState's stream is frozen, Generator's is not: the stored numbers outlive NumPy releases.
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(shape)
    if not shape:
        return np.asarray(_NUMBERS[name.rpartition(".")[2]], np.float32)
    if name.endswith("bias"):
        values = 0.1 * values
    elif name.endswith("sinks"):
        pass
    elif name.endswith("A_log"):
        values = values - 2
    elif len(shape) == 1:
        added = family.startswith(_ADDED_TO_1) and not name.endswith("linear_attn.norm.weight")
        values = 0.1 * values if added else 1 + 0.1 * values
    else:
        inputs = shape[-2] if _INPUTS_FIRST.search(name) else shape[-1]
        values = values / np.sqrt(inputs)
    return values.astype(np.float32)

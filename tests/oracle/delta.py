"""The gated delta rule and its convolution by transformers, of inputs that the tests use too.

`compute` gives what `tests/oracle/generate.py` stores in delta.npz; it needs torch and
transformers.
"""

import numpy as np

ROWS, LENGTH, CHUNK = 2, 37, 16
KEYS, VALUES, KEY_SIZE, VALUE_SIZE = 2, 4, 8, 6
WIDTH = 4


def inputs() -> dict[str, np.ndarray]:
    """Returns arguments of the rule under the names of transformers, and `state` before it."""
    random = np.random.default_rng(0)
    tokens = (ROWS, LENGTH)
    found = {
        "query": random.normal(size=(*tokens, KEYS, KEY_SIZE)),
        "key": random.normal(size=(*tokens, KEYS, KEY_SIZE)),
        "value": random.normal(size=(*tokens, VALUES, VALUE_SIZE)),
        "g": -random.exponential(size=(*tokens, VALUES)),
        "beta": random.uniform(size=(*tokens, VALUES)),
        "state": random.normal(size=(ROWS, VALUES, KEY_SIZE, VALUE_SIZE)),
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def convolved() -> dict[str, np.ndarray]:
    """Returns inputs of the convolution, channels last, its kernel and the inputs before them."""
    random = np.random.default_rng(1)
    shapes = {
        "x": (ROWS, LENGTH, KEYS, KEY_SIZE),
        "kernel": (KEYS, KEY_SIZE, WIDTH),
        "before": (ROWS, WIDTH - 1, KEYS, KEY_SIZE),
    }
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def compute() -> dict[str, np.ndarray]:
    """Returns outputs and states of both forms of the rule, gradients, and of the convolution."""
    import torch
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    settings = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    values = {name: torch.tensor(value) for name, value in inputs().items()}
    start = values.pop("state")
    found = {}
    for name, rule, own in (
        ("chunks", qwen.torch_chunk_gated_delta_rule, {"chunk_size": CHUNK}),
        ("recurrent", qwen.torch_recurrent_gated_delta_rule, {}),
    ):
        arguments = {key: value.clone().requires_grad_() for key, value in values.items()}
        out, state = rule(**arguments, initial_state=start, **settings, **own)
        found |= {f"{name}/out": out.detach(), f"{name}/state": state.detach()}
        if name == "chunks":
            (out.square().sum() + state.square().sum()).backward()
            found |= {f"gradients/{key}": value.grad for key, value in arguments.items()}

    def channels(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x.reshape(*x.shape[:2], -1)).transpose(1, 2)

    given = convolved()
    state, kernel = channels(given["before"]), torch.tensor(given["kernel"].reshape(-1, WIDTH))
    out = qwen.causal_conv1d_update(channels(given["x"]), state, kernel, activation="silu")
    fresh = qwen.causal_conv1d_fn(channels(given["x"]), kernel, activation="silu")
    for name, value, shape in (
        ("update/out", out, given["x"].shape),
        ("update/state", state, given["before"].shape),
        ("convolution/out", fresh, given["x"].shape),
    ):
        found[name] = value.transpose(1, 2).reshape(shape)
    return {name: value.numpy() for name, value in found.items()}

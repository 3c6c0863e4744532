"""Steps of published optimizers on a matrix, with gradients that the tests use too.

`compute` gives what `tests/oracle/generate.py` stores in optimizers.npz; it needs torch and
transformers.
"""

import numpy as np

STEPS, RATE, DECAY = 4, 0.01, 0.1
SHAPE = (12, 8)


def gradient(step: int) -> np.ndarray:
    """Returns the gradient in a step from 1; in step 0 the starting value."""
    return np.random.default_rng(step).normal(size=SHAPE).astype(np.float32)


def compute() -> dict[str, np.ndarray]:
    """Returns the matrix after all steps of each optimizer."""
    import torch
    from transformers.optimization import Adafactor

    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    makers = {
        "adafactor": lambda value: Adafactor([value], lr=RATE, weight_decay=DECAY, **fixed),
        "muon": lambda value: torch.optim.Muon(
            [value], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
        ),
    }
    found = {}
    for kind, make in makers.items():
        value = torch.nn.Parameter(torch.from_numpy(gradient(0)))
        optimizer = make(value)
        for step in range(1, STEPS + 1):
            value.grad = torch.from_numpy(gradient(step))
            optimizer.step()
        found[kind] = value.detach().numpy()
    return found

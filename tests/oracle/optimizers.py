"""Writes `optimizers.npz`: steps of published optimizers on a matrix.

    python tests/oracle/optimizers.py

Needs torch and transformers. Gradients are those of `gradient`, which the tests use too.
"""

from pathlib import Path

import numpy as np

STEPS, RATE, DECAY = 4, 0.01, 0.1
SHAPE = (12, 8)


def gradient(step: int) -> np.ndarray:
    """Returns the gradient in a step from 1; in step 0 the starting value."""
    return np.random.default_rng(step).normal(size=SHAPE).astype(np.float32)


def main() -> None:
    """Runs each optimizer."""
    import torch
    from transformers.optimization import Adafactor

    found = {}
    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    for kind in ("adafactor", "muon"):
        value = torch.nn.Parameter(torch.from_numpy(gradient(0)))
        if kind == "adafactor":
            optimizer = Adafactor([value], lr=RATE, weight_decay=DECAY, **fixed)
        else:
            optimizer = torch.optim.Muon(
                [value], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
            )
        for step in range(1, STEPS + 1):
            value.grad = torch.from_numpy(gradient(step))
            optimizer.step()
        found[kind] = value.detach().numpy()
    np.savez(Path(__file__).with_suffix(".npz"), **found)


if __name__ == "__main__":
    main()

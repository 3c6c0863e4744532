"""Reads a multimodal folder with transformers: `read_tower.py FOLDER TOKENS.npy OUT.npz`.

Stores the logits of text, the name of the class, and every parameter that is not of the text.
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForImageTextToText


def main() -> None:
    folder, tokens, output = sys.argv[1:]
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if any(loading.values()):
        raise SystemExit(f"tensors that are missing or left over: {loading}")
    with torch.no_grad():
        logits = model.eval()(torch.tensor(np.load(tokens))).logits.numpy()
    others = {
        name: value.detach().numpy()
        for name, value in model.named_parameters()
        if not name.startswith(("model.language_model.", "lm_head."))
    }
    np.savez(output, logits=logits, kind=type(model).__name__, **others)


if __name__ == "__main__":
    main()

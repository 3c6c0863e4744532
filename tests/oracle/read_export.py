"""Reads a folder with transformers and PyTorch: `read_export.py FOLDER TOKENS.npy OUT.npz`.

Stores the logits of the tokens, and the greedy continuation of the first row by `generate`, which
follows the folder's generation_config.json.
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, tokens_file, output = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor(np.load(tokens_file))
    with torch.no_grad():
        logits = model(tokens).logits.numpy()
        new = model.generate(tokens[:1], max_new_tokens=32, do_sample=False)
    np.savez(output, logits=logits, continuation=new[0, tokens.shape[1] :].numpy())


if __name__ == "__main__":
    main()

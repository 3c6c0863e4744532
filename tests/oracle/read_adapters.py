"""Reads adapters with PEFT: `read_adapters.py FOLDER…`.

Each folder holds `base`, `adapter` and `tokens.npy` `[B, T]`; `logits.npy` is written there.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        is_whole = hasattr(AutoConfig.from_pretrained(folder / "base"), "text_config")
        kind = AutoModelForImageTextToText if is_whole else AutoModelForCausalLM
        base = kind.from_pretrained(folder / "base", dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(base, folder / "adapter").eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(np.load(folder / "tokens.npy")).long()).logits
        np.save(folder / "logits.npy", logits.numpy())


if __name__ == "__main__":
    main()

"""Makes the demo's base model from nothing: `python -m jaxft.demo.make_base`, in a checkout.

Generates the text, trains the tokenizer, pre-trains by `configs/demo_base.py` and puts the result
into the package. The same versions on the same machine give the same files.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import jaxft
from jaxft.demo import BASE, corpus
from jaxft.demo.data import write_corpus
from jaxft.demo.runs import load_run
from jaxft.demo.tokenizer import SPECIAL_TOKENS, VOCABULARY, train_tokenizer, write_tokenizer
from jaxft.files import write_json
from jaxft.formatting import format_storage

FOLDER = Path("runs/demo_base")
TOKENIZER_DOCUMENTS = 20_000

_END_OF_TEXT, _END_OF_TURN, *_, _PADDING = range(len(SPECIAL_TOKENS))

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": _END_OF_TEXT,
    "pad_token_id": _PADDING,
    "dtype": "float32",
}
GENERATION_CONFIG: dict[str, Any] = {
    "eos_token_id": [_END_OF_TURN, _END_OF_TEXT],
    "pad_token_id": _PADDING,
    "do_sample": False,
}


def write_skeleton(folder: Path) -> None:
    """Writes tokenizer and configuration files: what a run from random weights starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = corpus.documents(TOKENIZER_DOCUMENTS, seed=corpus.TRAIN_SEED)
    max_length = CONFIG["max_position_embeddings"]
    write_tokenizer(train_tokenizer(texts), folder, max_length=max_length)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)


def main() -> None:
    """Writes the base model into the package, over the one that is there."""
    skeleton = FOLDER / "skeleton"
    write_skeleton(skeleton)
    write_corpus(FOLDER / "data")
    config = load_run("demo_base")
    config.model.path = str(skeleton)
    run = jaxft.train(config, overwrite=True)
    if run.exit_code:
        sys.exit(run.exit_code)
    exported = jaxft.export(run.checkpoint, FOLDER / "export", overwrite=True)
    # Only now, so that the package never holds a tokenizer with another one's weights.
    for file in (*skeleton.iterdir(), exported / "model.safetensors"):
        shutil.copyfile(file, BASE / file.name)
    size = sum(file.stat().st_size for file in BASE.iterdir())
    print(f"{BASE} holds the base model, {format_storage(size)}.")


if __name__ == "__main__":
    main()

"""Tells what a folder or repository holds in place of a model in safetensors, and what to do."""

import json
from collections.abc import Iterable
from pathlib import Path

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def explain_other_kind(source: str, files: Iterable[str], *, adapter: str = "") -> str:
    """Returns why there is no model to read and how to get one; an empty text if nobody knows.

    Args:
      source: Folder or repository id.
      files: Names of its files.
      adapter: Content of its adapter_config.json, if that is at hand.
    """
    names = sorted(files)

    def ending(*endings: str) -> list[str]:
        return [name for name in names if name.endswith(endings)]

    if "adapter_config.json" in names or any(n.startswith("adapter_model.") for n in names):
        return _explain_adapter(source, adapter)
    if found := ending(".gguf"):
        return gguf_hint(source, found[0])
    if "params.json" in names and ending(".pth", "consolidated.safetensors"):
        return (
            f"{source} holds a model in its makers' own layout (params.json), not in that of "
            "Hugging Face. Use the repository or folder with config.json and model.safetensors; "
            "transformers has scripts that convert it (models/*/convert_*_weights_to_hf.py)."
        )
    # What trainers write beside weights is pickled, too.
    if [name for name in ending(*_PICKLED) if name not in ("training_args.bin", "optimizer.pt")]:
        return conversion_hint(source)
    if found := ending(".h5", ".msgpack"):
        kind = "TensorFlow's" if found[0].endswith(".h5") else "Flax'"
        option = "from_tf" if found[0].endswith(".h5") else "from_flax"
        return (
            f"{source} holds {kind} weights ({found[0]}), which jaxft does not read. Convert them "
            f"once, where {kind.rstrip("'s")}, torch and transformers 4 are installed:\n"
            f"{_convert(source, option + '=True')}"
        )
    if found := ending(".onnx"):
        return (
            f"{source} holds ONNX ({found[0]}): a compiled graph, which cannot be trained. Use the "
            "repository or folder that it was made of, with config.json and model.safetensors."
        )
    return ""


def explain_folder(folder: Path) -> str:
    """Returns why a local folder holds no model to read, and how to get one.

    It is empty if the folder looks like a model of which a part is missing.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}."
    if (folder.parent / "checkpoints").is_dir() and folder.name in ("model", "checkpoints"):
        return f"{folder} is a part of a run; name the run's folder, {folder.parent}."
    if not names:
        return f"{folder} is empty; a model is config.json, model.safetensors and a tokenizer."
    if "environment.json" in names and "metrics.jsonl" in names:
        return f"{folder} is the folder of a run that has saved no checkpoint yet."
    adapter = folder / "adapter_config.json"
    content = adapter.read_text(encoding="utf-8") if adapter.is_file() else ""
    if text := explain_other_kind(str(folder), names, adapter=content):
        return text
    nested = [path for path in sorted(folder.glob("*/config.json")) if path.is_file()]
    if "config.json" not in names and nested:
        return f"{folder} holds no model itself; did you mean {nested[0].parent}?"
    if "config.json" not in names and not any(name.endswith(".safetensors") for name in names):
        held = "a tokenizer but no model" if "tokenizer_config.json" in names else "no model"
        return f"{folder} holds {held}: neither config.json nor weights."
    return ""


def conversion_hint(source: str) -> str:
    """Returns why pickled weights are refused, and how to convert them."""
    return (
        f"{source} holds PyTorch's pickled weights (.bin), which run code when they are opened. "
        "Convert them once, where torch and transformers are installed:\n"
        f"{_convert(source, '')}"
    )


def gguf_hint(source: str, file: str) -> str:
    """Returns why a GGUF file is not read, and how to convert it."""
    return (
        f"{source} holds GGUF ({file}), a format for inference, mostly quantised; jaxft trains "
        "config.json and model.safetensors. Use the repository that it was made of. If there is "
        "none, unpack it once, where torch, transformers and gguf are installed:\n"
        f"{_convert(source, f'gguf_file={file!r}', tokenizer=f'gguf_file={file!r}')}"
    )


def _explain_adapter(source: str, content: str) -> str:
    try:
        base = json.loads(content).get("base_model_name_or_path") or ""
    except (ValueError, AttributeError):
        base = ""
    target = f"{Path(source).name}-merged"
    return (
        f"{source} holds an adapter (adapter_config.json, such as LoRA), not a whole model"
        f"{f': it belongs to {base!r}' if base else ''}. Merge it into that first:\n"
        f"  jaxft export --merge --checkpoint={source} --output={target}\n"
        f"and use the folder {target}."
    )


def _convert(source: str, option: str, *, tokenizer: str = "") -> str:
    target = f"{Path(source).name}-safetensors"
    options, words = (f", {text}" if text else "" for text in (option, tokenizer))
    return (
        '  python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained({source!r}, dtype='auto'{options}).save_pretrained({target!r}); "
        f'T.from_pretrained({source!r}{words}).save_pretrained({target!r})"\n'
        f"and use the folder {target}."
    )

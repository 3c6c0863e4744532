"""Writing a model as a Hugging Face folder that other tools load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxft.errors import ConfigError, ModelError, nearest
from jaxft.hf.save import atomic_folder, save_params
from jaxft.hf.tokenizer import save_tokenizer
from jaxft.model import Model, hf_config, load, tensor_dtypes_of

# Types that `dtype` may name.
DTYPES = ("float32", "bfloat16", "float16")


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    step: str = "best",
    dtype: str = "",
    overwrite: bool = False,
    verify: bool = False,
    on_log: Callable[[str], None] = print,
) -> Path:
    """Writes safetensors, config.json, generation_config.json, tokenizer and chat template.

    Args:
      checkpoint: Workdir of a run, one of its checkpoints, or any model that `load` takes.
      output: Folder to make; appears under its name only when it is complete.
      step: Which checkpoint of a workdir: `best`, `latest` or a number.
      dtype: Type of every tensor, such as `bfloat16`; empty: that of each tensor in the files the
        weights once came from.
      overwrite: Replace a folder that is there.
      verify: Load the result and compare logits; differences are those of the dtype's rounding.
      on_log: Takes a line of text for each thing worth saying.

    Returns:
      The folder.

    Raises:
      ModelError: If the folder exists, the disk is full, or `verify` finds other weights.
    """
    if dtype not in ("", *DTYPES):
        raise ConfigError(
            f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}"
        )
    # In the host's memory: a model that needed several devices to train fits there.
    model = load(checkpoint, step=step, device=jax.devices("cpu")[0])
    output = Path(output).expanduser()
    if model.source.checkpoints is not None:
        on_log(f"Exporting checkpoint {model.source.step} of {model.source.checkpoints.parent}.")
    dtypes = dtype or tensor_dtypes_of(model.source) or "float32"
    with atomic_folder(output, overwrite=overwrite) as folder:
        save_params(folder, model.architecture.rules, model.params, dtypes=dtypes)
        config = hf_config(model.source, model.architecture)
        if dtype:
            config |= {name: dtype for name in ("dtype", "torch_dtype") if name in config}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_generation_config(model, folder)
        save_tokenizer(model.tokenizer, folder, chat_template=model.tokenizer.chat_template)
        if verify:
            names = {dtypes} if isinstance(dtypes, str) else set(dtypes.values())
            difference = _verify(model, folder, exact=names == {"float32"})
            on_log(f"Largest difference of logits after loading it again: {difference:.3g}")
    return output


def _write_generation_config(model: Model, folder: Path) -> None:
    """Copies the file that came with the model, or makes one; every stop id goes into it."""
    source = model.source.folder / "generation_config.json"
    target = folder / "generation_config.json"
    stops = list(model.stop_ids)
    fields = json.loads(source.read_text()) if source.is_file() else {}
    known = fields.get("eos_token_id", [])
    known = known if isinstance(known, list) else [known]
    if source.is_file() and set(stops) <= set(known):
        shutil.copyfile(source, target)
        return
    if model.tokenizer.bos_token_id is not None:
        fields.setdefault("bos_token_id", model.tokenizer.bos_token_id)
    if stops:
        fields["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    target.write_text(json.dumps(fields, indent=2) + "\n")


def _verify(model: Model, folder: Path, *, exact: bool) -> float:
    """Returns the largest difference of logits between a model and its export, on random tokens.

    Args:
      model: What was exported.
      folder: The export.
      exact: Whether no tensor was rounded.

    Raises:
      ModelError: If the exported folder holds other weights than rounding explains.
    """
    config = model.architecture.config
    length = min(64, config.max_length)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, length))
    again = load(folder, device=jax.devices("cpu")[0])
    ours, theirs = (jax.device_get(m(tokens)) for m in (model, again))
    difference = float(np.max(np.abs(ours - theirs)))
    # bfloat16 keeps 8 bits: logits move by a few hundredths of their size, not by their size.
    if not difference <= (0.0 if exact else 0.1 * float(np.max(np.abs(ours)))):
        raise ModelError(
            f"The export gives other logits than the model it was made of: they differ by up to "
            f"{difference:.3g}. Nothing was kept of it; report this with the model's config.json."
        )
    return difference

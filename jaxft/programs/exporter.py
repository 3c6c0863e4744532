"""Writing a model as a Hugging Face folder that other tools load."""

import collections
import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.errors import ConfigError, ModelError, nearest
from jaxft.files import as_json
from jaxft.hf.folder import ModelFolder
from jaxft.hf.load import open_params
from jaxft.hf.read import Reader
from jaxft.hf.save import Readable, atomic_folder, save_params
from jaxft.hf.save_tokenizer import save_tokenizer
from jaxft.hf.stored import tensor_dtypes
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.vocabulary import with_rows_for
from jaxft.programs.description import default_template, hf_config, stop_ids_of, tensor_dtypes_of
from jaxft.programs.model import load
from jaxft.workdir.checkpoint import Checkpoints
from jaxft.workdir.source import Source, find_source

# Types that `dtype` may name.
DTYPES = ("float32", "bfloat16", "float16")
# Values compared at a time.
_COMPARED = 2**24
# Most that logits may move if weights are rounded, as a share of the largest one.
_ROUNDING = 0.1


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    step: str = "best",
    revision: str = "",
    dtype: str = "",
    overwrite: bool = False,
    verify: bool = False,
    on_log: Callable[[str], None] = print,
) -> Path:
    """Writes safetensors, config.json, generation_config.json, tokenizer and chat template.

    The weights go from file to file, a part of a tensor at a time; only a Hugging Face folder whose
    tokenizer has tokens without a row is loaded as a whole. An export that was killed goes
    on where it stopped when it is started again with the same arguments.

    Args:
      checkpoint: Workdir of a run, one of its checkpoints, or any model that `load` takes.
      output: Folder to make; appears under its name only when it is complete.
      step: Which checkpoint of a workdir: `best`, `latest` or a number.
      revision: Branch, tag or commit of a repository id.
      dtype: Type of every tensor, such as `bfloat16`; empty: that of each tensor in the files the
        weights once came from, or bfloat16 for those that were in MXFP4.
      overwrite: Replace a folder that is there.
      verify: Compare all weights and some logits with those of what was exported, which needs
        memory for one model in float32, and say what was found. Written in the same type nothing
        may differ, in a narrower one what rounding explains.
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
    source = find_source(checkpoint, step=step, revision=revision)
    described, stored = source.described, source.architecture
    tokenizer = described.load_tokenizer()
    architecture = with_rows_for(stored, tokenizer)
    grown = architecture is not stored
    config = hf_config(source, architecture)
    output = Path(output).expanduser()
    _check_apart(output, source)
    if source.checkpoints is not None:
        on_log(f"Exporting checkpoint {source.step} of {source.checkpoints.parent}.")
    before = tensor_dtypes_of(source)
    dtypes = (dict.fromkeys(before, dtype) if dtype else before) or dtype or "float32"
    if described.config.get("quantization_config"):
        on_log("The experts were stored in MXFP4; they are written unpacked.")
    if tokenizer is None:
        on_log(f"{source.folder} has no tokenizer; the export has none either.")
    content = {"from": _identity(source), "dtypes": dtypes}
    with atomic_folder(output, overwrite=overwrite, content=content) as folder:
        with _parameters(source, architecture, grown=grown) as params:
            kept = save_params(
                folder,
                architecture.naming,
                params,
                dtypes=dtypes,
            )
        if kept:
            on_log(f"Files of weights that an earlier export had written: {kept}.")
        config |= _dtype_fields(config, folder)
        (folder / "config.json").write_text(as_json(config), encoding="utf-8")
        _write_generation_config(described, tokenizer, folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        if verify:
            on_log(_verify(source, architecture, folder, grown=grown))
    return output


def _dtype_fields(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Returns what config.json says of types, where that is not what the files hold."""
    held = collections.Counter(tensor_dtypes(folder).values())
    named = [name for name in ("dtype", "torch_dtype") if name in config]
    return {name: held.most_common(1)[0][0] for name in named if config[name] not in held}


@contextlib.contextmanager
def _parameters(
    source: Source, architecture: Architecture, *, grown: bool
) -> Iterator[Mapping[str, Readable]]:
    """Yields parameters that stay in their files until a part of them is asked for.

    Those of a Hugging Face folder whose tokenizer has tokens without a row are loaded and grown.
    """
    if grown:
        yield load(source.folder, device=jax.devices("cpu")[0]).params
        return
    abstract = architecture.abstract(make_numerics("float32")).params
    shapes = {path: spec.shape for path, spec in abstract.items()}
    if source.checkpoints is None:
        with Reader() as reader:
            yield open_params(
                reader,
                source.folder,
                architecture.naming,
                shapes,
            )
        return
    checkpoints = Checkpoints(source.checkpoints, read_only=True)
    try:
        yield checkpoints.open_params(shapes, source.step)
    finally:
        checkpoints.close()


def _check_apart(output: Path, source: Source) -> None:
    """Raises ModelError where replacing `output` would delete what is exported."""
    for folder in (source.folder, source.checkpoints):
        if folder is not None and folder.resolve().is_relative_to(output.resolve()):
            raise ModelError(
                f"{output} holds what is exported, {folder}. Name a folder apart from it."
            )


def _identity(source: Source) -> list[Any]:
    """Returns what changes if the weights of a source do."""
    if source.checkpoints is not None:
        files = [source.checkpoints / str(source.step) / "_CHECKPOINT_METADATA"]
    else:
        files = sorted(source.folder.glob("*.safetensors"))
    stats = [(file, file.stat()) for file in files]
    return [[str(file.absolute()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _write_generation_config(described: ModelFolder, tokenizer: Any, folder: Path) -> None:
    """Copies the file that came with the model, or makes one that names every stop id.

    A file that names stops is taken at its word: it gets only those that training puts at the end
    of a last answer, without which other tools would never stop.
    """
    fields, name = dict(described.generation), "generation_config.json"
    known = fields.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    chats = tokenizer is not None and tokenizer.chat_template
    taught = default_template(tokenizer).last_stops.values() if chats else ()
    stops = sorted({*known, *taught} if known else stop_ids_of(described, tokenizer))
    if (described.path / name).is_file() and set(stops) == set(known):
        shutil.copyfile(described.path / name, folder / name)
        return
    if tokenizer is not None and tokenizer.bos_token_id is not None:
        fields.setdefault("bos_token_id", tokenizer.bos_token_id)
    if stops:
        fields["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    (folder / name).write_text(as_json(fields), encoding="utf-8")


def _verify(source: Source, architecture: Architecture, folder: Path, *, grown: bool) -> str:
    """Compares an export with what it was made of; returns what was compared, and the verdict.

    Raises:
      ModelError: If the exported folder holds other weights than rounding explains.
    """
    made_of = (
        f"{source.folder}"
        if source.checkpoints is None
        else f"checkpoint {source.step} of {source.checkpoints.parent}"
    )
    exact, values = True, 0
    for path, ours, theirs in _pairs(source, architecture, folder, grown=grown):
        values += ours.size
        if ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes():
            continue
        wide = ours.astype(np.float32)
        written = theirs.astype(np.float32)
        exact &= np.array_equal(wide, written, equal_nan=True)
        if not np.array_equal(wide.astype(theirs.dtype), theirs, equal_nan=True):
            raise ModelError(
                f"The export holds other weights than {made_of}: {path} differs by up to "
                f"{np.max(np.abs(wide - written)):.3g}. Nothing was kept of it; report this with "
                "the model's config.json."
            )
    names = ", ".join(sorted(set(tensor_dtypes(folder).values())))
    count = f"all {values:,} weights of {made_of} with those of the export, loaded again"
    tokens = np.random.default_rng(0).integers(
        0, architecture.config.vocab, (2, min(64, architecture.config.max_length))
    )
    difference, largest = _difference_of_logits(source, folder, tokens)
    if exact and difference == 0:
        return (
            f"Verified: compared {count}, and logits of {tokens.size} random tokens. All are equal."
        )
    # bfloat16 keeps 8 bits: logits move by a few hundredths of their size, not by their size.
    if exact or not difference <= _ROUNDING * largest:
        raise ModelError(
            f"The export gives other logits than {made_of}: they differ by up to "
            f"{difference:.3g}. Nothing was kept of it; report this with the model's config.json."
        )
    return (
        f"Verified: compared {count}. Each is equal once rounded to {names}. Largest difference of "
        f"logits, of {tokens.size} random tokens: {difference:.3g}, which is "
        f"{difference / largest:.2%} of the largest logit; up to {_ROUNDING:.0%} is taken for "
        "rounding."
    )


def _pairs(
    source: Source, architecture: Architecture, folder: Path, *, grown: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields the name of a parameter, some rows of it as exported from, and as exported."""
    shapes = {
        path: spec.shape
        for path, spec in architecture.abstract(make_numerics("float32")).params.items()
    }
    with _parameters(source, architecture, grown=grown) as ours, Reader() as reader:
        theirs = open_params(
            reader,
            folder,
            architecture.naming,
            shapes,
        )
        for path, shape in shapes.items():
            step = max(1, _COMPARED * shape[0] // math.prod(shape))
            for start in range(0, shape[0], step):
                rows = slice(start, min(start + step, shape[0]))
                index = (rows, *(slice(0, size) for size in shape[1:]))
                yield path, np.asarray(ours[path][index]), np.asarray(theirs[path][index])


def _difference_of_logits(source: Source, folder: Path, tokens: np.ndarray) -> tuple[float, float]:
    """Returns the largest difference of logits, and the largest logit."""
    # On the host: a model that needed several devices to train fits there.
    host = jax.devices("cpu")[0]
    path = source.folder if source.checkpoints is None else source.checkpoints / str(source.step)
    model = load(path, device=host)
    ours = jax.device_get(model(tokens))
    del model
    theirs = jax.device_get(load(folder, device=host)(tokens))
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    return float(np.max(np.abs(ours - theirs), where=~same, initial=0)), float(np.max(np.abs(ours)))

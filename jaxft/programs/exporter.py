"""Writing a model as a Hugging Face folder that other tools load."""

import collections
import contextlib
import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxft.errors import ConfigError, ModelError, nearest
from jaxft.files import as_json, stamps
from jaxft.hf.decoded import Passed
from jaxft.hf.folder import ModelFolder, quantisation
from jaxft.hf.peft.modules import CONFIG
from jaxft.hf.peft.write import warning_of_experts, write_adapter
from jaxft.hf.rules import Naming
from jaxft.hf.save import Readable, atomic_folder, save_params
from jaxft.hf.save_tokenizer import save_tokenizer
from jaxft.hf.stored import other_tensors, tensor_dtypes
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.module import is_unlearnt
from jaxft.programs.beside import copy_files, differing, find_others, identity_of
from jaxft.programs.description import (
    default_template,
    grown,
    hf_config,
    stop_ids_of,
    tensor_dtypes_of,
)
from jaxft.programs.digests import check_base
from jaxft.programs.merging import merged
from jaxft.programs.opened import open_base, open_weights, read_adapter, with_added_rows
from jaxft.programs.verification import judge_merged, verify_adapter
from jaxft.programs.verification import verify as verify_export
from jaxft.workdir.source import Source, find_source

# Types that `dtype` may name.
DTYPES = ("float32", "bfloat16", "float16")


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    step: str = "best",
    revision: str = "",
    base: str | Path = "",
    merge: bool = False,
    dtype: str = "",
    overwrite: bool = False,
    verify: bool = False,
    on_log: Callable[[str], None] = print,
) -> Path:
    """Writes safetensors, config.json, generation_config.json, tokenizer and chat template.

    Of an adapter, only that is written, in PEFT's format, unless it is to be merged.

    The weights go from file to file, a part of a tensor at a time; only tables that grow, as the
    tokenizer has tokens without a row, are read as a whole. An export that was killed goes
    on where it stopped when it is started again with the same arguments.

    Args:
      checkpoint: Workdir of a run, one of its checkpoints, or any model that `load` takes.
      output: Folder to make; appears under its name only when it is complete.
      step: Which checkpoint of a workdir: `best`, `latest` or a number.
      revision: Branch, tag or commit of a repository id.
      base: Model that an adapter is made for, where it is not the one that the adapter names; or
        the multimodal model of which a run holds the text, where that has moved.
      merge: Write a whole model with the adapter in it: merged in float32 into the weights of the
        base's own files. How much of the adapter is left after rounding, and how far logits move,
        is said.
      dtype: Type of every tensor that training may change, such as `bfloat16`; empty: that of each
        tensor in the files the weights once came from, or bfloat16 for those that were in MXFP4 or
        FP8.
      overwrite: Replace a folder that is there.
      verify: Compare all weights and some logits with those of what was exported, which needs
        memory for one model in float32, and say what was found. Written in the same type nothing
        may differ, in a narrower one what rounding explains.
      on_log: Takes a line of text for each thing worth saying.

    Returns:
      The folder.

    Raises:
      ModelError: If the folder exists, the disk is full, or `verify` finds other weights.
      CheckpointError: If an adapter's base has not the weights that its run had.
    """
    if dtype not in ("", *DTYPES):
        raise ConfigError(
            f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}"
        )
    source = find_source(checkpoint, step=step, revision=revision, base=str(base), whole=True)
    if merge and not source.is_adapter:
        raise ConfigError(f"{source.name} is a whole model: there is no adapter to merge.")
    output = Path(output).expanduser()
    _check_apart(output, source)
    if source.checkpoints is not None:
        on_log(f"Exporting checkpoint {source.step} of {source.checkpoints.parent}.")
    if merge or base:
        check_base(source)
    if source.is_adapter and not merge:
        if dtype:
            raise ConfigError("An adapter is written in float32; --dtype is for --merge.")
        _export_adapter(source, output, overwrite=overwrite, verify=verify, on_log=on_log)
        return output
    described, stored = source.described, source.architecture
    others = find_others(source, stored)
    _check_apart(output, others=others)
    if others:
        on_log(
            "Tensors beside the model, which are written as they are, those in FP8 decoded: "
            f"{len(others)}."
        )
    tokenizer = described.load_tokenizer()
    architecture = grown(stored, tokenizer)
    config = hf_config(source, architecture)
    before = tensor_dtypes_of(source)
    dtypes = _types_as_asked(before, dtype, stored.naming) or dtype or "float32"
    if method := quantisation(described.config).get("quant_method"):
        what = "The experts" if method == "mxfp4" else "Weights"
        on_log(f"{what} were stored in {method.upper()}; they are written unpacked.")
    if tokenizer is None:
        on_log(f"{source.folder} has no tokenizer; the export has none either.")
    opened = functools.partial(_open, source, architecture, tokenizer)
    content = {"from": _identity(source), "dtypes": dtypes, "others": identity_of(others)}
    with atomic_folder(output, overwrite=overwrite, content=content) as folder:
        with opened() as params:
            kept = save_params(
                folder,
                architecture.naming,
                params,
                dtypes=dtypes,
                others=others,
            )
        if kept:
            on_log(f"Files of weights that an earlier export had written: {kept}.")
        held = tensor_dtypes(folder)
        config |= _dtype_fields(config, held.values())
        if stored.naming.alone is not None:
            text = [kind for name, kind in held.items() if not stored.naming.is_other(name)]
            config["text_config"] |= _dtype_fields(config["text_config"], text)
        (folder / "config.json").write_text(as_json(config), encoding="utf-8")
        _write_generation_config(described, tokenizer, folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        if stored.naming.alone is not None:
            copy_files(described.path, folder)
        if verify:
            _check_others(folder, stored, others)
        if merge:
            for line in judge_merged(source, architecture, folder, opened, weights=verify):
                on_log(line)
        elif verify:
            on_log(verify_export(source, architecture, folder, opened))
    return output


def _dtype_fields(config: Mapping[str, Any], dtypes: Iterable[str]) -> dict[str, str]:
    """Returns what config.json says of types, where that is not what the files hold."""
    held = collections.Counter(dtypes)
    named = [name for name in ("dtype", "torch_dtype") if name in config]
    return {name: held.most_common(1)[0][0] for name in named if config[name] not in held}


@contextlib.contextmanager
def _open(
    source: Source, architecture: Architecture, tokenizer: Any
) -> Iterator[Mapping[str, Readable]]:
    """Yields what is written: the parameters of a model, with the adapter in them if it has one."""
    if not source.is_adapter:
        with open_weights(source, architecture, tokenizer=tokenizer) as params:
            yield params
        return
    adapter = read_adapter(source, architecture)
    with open_base(source, architecture, tokenizer) as params:
        yield merged(architecture, params, adapter)


def _export_adapter(
    source: Source,
    output: Path,
    *,
    overwrite: bool,
    verify: bool,
    on_log: Callable[[str], None],
) -> None:
    """Writes an adapter in PEFT's format, with the tokenizer of its model."""
    if source.base is None:
        raise ConfigError(
            f"{source.name} is an adapter of random weights that its run alone has. Export both as "
            "one model, with --merge."
        )
    architecture = source.architecture
    tokenizer = source.described.load_tokenizer()
    own = read_adapter(source, architecture)
    adapter = with_added_rows(own, source, architecture, tokenizer)
    if adapter is not own:
        check_base(source)
    abstract = architecture.plain.abstract(make_numerics("float32")).params
    shapes = {path: spec.shape for path, spec in abstract.items()}
    if source.base.checkpoints is not None:
        on_log(
            f"The adapter names {source.base.path} as its base, the folder of a run, which other "
            "programs do not read: export that as well, and put the path of the export into "
            f"base_model_name_or_path of {CONFIG}."
        )
    rows, stored = architecture.config.vocab, source.base.architecture.config.vocab
    if rows != stored:
        on_log(
            f"The embedding has {rows} rows, and that of {source.base.path} {stored}: programs "
            f"other than jaxft need the base with {rows} (resize_token_embeddings({rows}) in "
            "transformers)."
        )
    if warning := warning_of_experts(adapter.owners("lora_b"), architecture.naming):
        on_log(warning)
    with atomic_folder(output, overwrite=overwrite) as folder:
        write_adapter(folder, adapter, architecture.naming, shapes)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        if verify:
            on_log(verify_adapter(source, Source(folder, base=source.base)))


def _types_as_asked(before: Mapping[str, str], dtype: str, naming: Naming) -> dict[str, str]:
    """Returns the type to write of each tensor; what nothing trains keeps its own."""
    if not dtype:
        return dict(before)
    fixed = tuple(
        "." + rule.theirs.rpartition("}.")[2] for rule in naming.rules if is_unlearnt(rule.ours)
    )
    return {name: own if name.endswith(fixed) else dtype for name, own in before.items()}


def _check_others(folder: Path, architecture: Architecture, others: Mapping[str, Passed]) -> None:
    """Raises ModelError if tensors beside the model were not written as they are."""
    if names := differing(others, other_tensors(folder, architecture.naming)):
        raise ModelError(
            f"The export holds other tensors beside the model than the {len(others)} that were to "
            f"be passed on: {', '.join(names[:5])}. Nothing was kept of it; report this."
        )


def _check_apart(
    output: Path, source: Source | None = None, others: Mapping[str, Passed] = MappingProxyType({})
) -> None:
    """Raises ModelError where replacing `output` would delete what is exported."""
    parts = [part for part in (source, source and source.base) if part is not None]
    folders = [path for part in parts for path in (part.folder, part.checkpoints)]
    for folder in {*folders, *(entry.file.parent for entry in others.values())}:
        if folder is not None and folder.resolve().is_relative_to(output.resolve()):
            raise ModelError(
                f"{output} holds what is exported, {folder}. Name a folder apart from it."
            )


def _identity(source: Source) -> list[Any]:
    """Returns what changes if the weights of a source do, or of what an adapter is made for."""
    base = [] if source.base is None else _identity(source.base)
    if source.checkpoints is not None:
        files = [source.checkpoints / str(source.step) / "_CHECKPOINT_METADATA"]
    else:
        files = sorted(source.folder.glob("*.safetensors"))
        files += [source.folder / CONFIG] if source.is_peft else []
    return [*base, *stamps(files)]


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

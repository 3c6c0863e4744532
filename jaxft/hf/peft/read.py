"""Reads an adapter in PEFT's format, as PEFT or another program wrote it.

Where a module holds several of our sites, each gets the module's A and its rows of B, without the
rows of A that B has only zeros for: what `write_adapter` wrote comes back as it was.
"""

import collections
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxft.errors import ModelError
from jaxft.hf.folder import read_json
from jaxft.hf.peft.adapter import Adapter
from jaxft.hf.peft.fields import PeftConfig, understand
from jaxft.hf.peft.modules import (
    CONFIG,
    MAGNITUDE,
    PREFIX,
    ROWS,
    WEIGHTS,
    A,
    B,
    Module,
    find_modules,
    is_named,
    module_name,
    name_pairs,
    site_of,
)
from jaxft.hf.read import Entry
from jaxft.hf.rules import Naming, Tensor, expand
from jaxft.hf.stored import differing, group_names, scan_file

_FLOAT32 = np.dtype(np.float32)
_UNKNOWN = "is nothing that an adapter of this model has; name the base that it was made for"
_MISSING = f"is missing, though {CONFIG} names its module; the file is not complete"
_LOOKED_UP = (
    "adapts a table that is looked up, which jaxft does not; merge the adapter with PEFT "
    "(merge_and_unload) and use the merged model"
)


def read_adapter(folder: Path, naming: Naming, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Returns the adapter that a folder holds.

    Modules of experts may have the names of files, one for each expert, or those of the models
    that transformers builds since its version 5. An adapter that was made for the text model alone
    is one of the same text within a whole.

    Args:
      folder: With adapter_config.json and adapter_model.safetensors.
      naming: The names and layouts of the base's family.
      shapes: Of all parameters of the base, weights as if they were dense.

    Raises:
      ModelError: If a field or a tensor is missing, not understood or does not fit the base, with
        all of these; no array has been made by then.
    """
    config = understand(read_json(folder / CONFIG))
    return _Folder(folder, config, naming, shapes).adapter()


@dataclass(frozen=True, slots=True)
class _Pair:
    """A module and its tensors in the file.

    Attributes:
      module: Module that it adapts.
      a: `[E r, in]`.
      b: `[out, r E]`.
      magnitude: `[out]`, None without DoRA.
      rank: Size of the inner axis.
      alpha: Alpha of the module.
      scale: Factor of the pair.
    """

    module: Module
    a: Entry
    b: Entry
    magnitude: Entry | None
    rank: int
    alpha: float
    scale: float

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pair as float32 `[E, r, in]` and `[E, out, r]`."""
        a, b = (entry.map().astype(_FLOAT32) for entry in (self.a, self.b))
        return self.module.part_a(a), self.module.split_b(b)


class _Folder:
    """The tensors of a folder, each told what it is, and what is wrong with them."""

    def __init__(
        self,
        folder: Path,
        config: PeftConfig,
        naming: Naming,
        shapes: Mapping[str, tuple[int, ...]],
    ):
        self._path = folder / WEIGHTS
        self._config = config
        self._shapes = shapes
        left, self._problems = _scan(folder)
        self._naming = naming = _naming_of(left, naming)
        self._left = {_respelt(name, naming): entry for name, entry in left.items()}
        # Names of tensors by what is wrong with them.
        self._reasons: dict[str, list[str]] = collections.defaultdict(list)
        self._pairs = self._find_pairs()
        self._whole = self._find_whole()
        self._rows = self._find_rows()
        for name in self._left:
            looked_up = ".lora_embedding_" in name
            self._reasons[_LOOKED_UP if looked_up else _UNKNOWN].append(name)
        for reason, names in self._reasons.items():
            self._problems += [f"{WEIGHTS}: {group} {reason}." for group in group_names(names)]
        if self._problems:
            raise ModelError([f"{folder}: {problem}" for problem in self._problems])

    def adapter(self) -> Adapter:
        """Reads everything; raises ModelError for numbers that are not finite."""
        arrays: dict[str, np.ndarray] = {}
        alphas: dict[str, float] = {}
        for pairs in self._pairs.values():
            _read_sites(pairs, self._shapes, arrays, alphas, self._config.rslora)
        for tensor, entry in self._whole:
            values = entry.map()
            for part in tensor.parts:
                path = part.rule.ours
                whole = arrays.setdefault(path, np.empty(self._shapes[path], _FLOAT32))
                whole[part.index] = part.to_ours(values)
        for path, entry in self._rows.items():
            arrays[path] = entry.map().astype(_FLOAT32)
        bad = [path for path, array in arrays.items() if not np.isfinite(array).all()]
        if bad:
            raise ModelError(
                f"{self._path} holds numbers that are not finite (NaN or infinite): "
                f"{', '.join(bad)}. The file is damaged, or training diverged before it was "
                "written; take another copy, or an earlier checkpoint."
            )
        return Adapter(
            arrays,
            alphas,
            rslora=self._config.rslora,
            tokens=next(iter(self._config.tokens.values())) if self._rows else (),
            dropout=self._config.dropout,
            base=self._config.base,
            revision=self._config.revision,
        )

    def _find_pairs(self) -> dict[tuple[str, ...], list[_Pair]]:
        """Returns what is adapted, by the sites that are a module together."""
        found: dict[tuple[str, ...], list[_Pair]] = collections.defaultdict(list)
        for rules in (self._naming.rules, self._naming.renamed):
            modules = find_modules(self._naming, rules, self._shapes)
            named = name_pairs(modules, self._config.parameters)
            self._note_missing(named)
            for start, module in named.items():
                if pair := self._take_pair(start, module):
                    found[module.sites].append(pair)
                # PEFT saves the base's table of an adapted head as well; it may have grown.
                table = self._left.pop(f"{start}.base_layer.weight", None)
                if table is not None:
                    self._left[PREFIX + module.tensor.name] = table
        counts = collections.Counter(site for sites in found for site in sites)
        self._problems += [
            f"{WEIGHTS} has {site} under the names of two versions of transformers."
            for site, count in counts.items()
            if count > 1
        ]
        if self._config.dora:
            self._problems += [
                f"{WEIGHTS} has no magnitudes of {', '.join(sites)} in some layers; DoRA of a "
                "part of the layers is not understood. Adapt all layers."
                for sites, pairs in found.items()
                if len(pairs) < math.prod(_leading(pairs[0].module, self._shapes))
            ]
        return found

    def _note_missing(self, named: Mapping[str, Module]) -> None:
        """Notes modules that the config names and the file does not have.

        Where the names of files have a module for each expert, transformers may have none.
        """
        present = {
            start: any(start + end in self._left for end in (A, B, MAGNITUDE)) for start in named
        }
        begun = {module.sites for start, module in named.items() if present[start]}
        for start, module in named.items():
            is_experts = len(module.tensor.parts[0].index) > 1
            if present[start] or (is_experts and module.sites not in begun):
                continue
            if module.is_parameter or module.name in self._config.targets:
                self._reasons[_MISSING].append(start + A)

    def _take_pair(self, start: str, module: Module) -> _Pair | None:
        """Returns what the file has of a module, None if nothing or something does not fit."""
        rank, alpha = self._config.rank_of(module.name), self._config.alpha_of(module.name)
        scale = alpha / (math.sqrt(rank) if self._config.rslora else rank)
        width = module.experts * rank
        # Early versions of PEFT's module for magnitudes wrote its name as well.
        old = self._left.pop(start + MAGNITUDE + ".weight", None)
        if old is not None:
            self._left[start + MAGNITUDE] = old
        expected: dict[str, tuple[int, ...]] = {
            A: (width, module.inputs),
            B: (module.outputs, width),
        }
        if self._config.dora:
            expected[MAGNITUDE] = (module.outputs,)
        if not any(start + end in self._left for end in expected):
            return None
        entries = [
            self._take(start + end, shape, f"rank {rank} of {CONFIG}")
            for end, shape in expected.items()
        ]
        a, b, magnitude = (*entries, None)[:3]
        if a is None or b is None or None in entries:
            return None
        return _Pair(module, a, b, magnitude, rank, alpha, scale)

    def _take(self, name: str, shape: tuple[int, ...], why: str) -> Entry | None:
        """Returns a tensor that has to be there, None if it does not fit."""
        if name not in self._left:
            self._reasons["is missing"].append(name)
            return None
        entry = self._left.pop(name)
        if reason := entry.problem():
            self._reasons[reason.removesuffix(".")].append(name)
        elif entry.shape != shape:
            reason = f"has shape {list(entry.shape)}; the model and {why} ask for {list(shape)}"
            self._reasons[reason].append(name)
        else:
            return entry
        return None

    def _find_whole(self) -> list[tuple[Tensor, Entry]]:
        """Returns the parameters that are there as a whole."""
        tensors = {tensor.name: tensor for tensor in expand(self._naming.rules, self._shapes)}
        present = {name for name in tensors if PREFIX + name in self._left}
        present |= {name for name in tensors if is_named(module_name(name), self._config.saved)}
        paths = {part.rule.ours for name in present for part in tensors[name].parts}
        found = []
        for name, tensor in tensors.items():
            if not paths & {part.rule.ours for part in tensor.parts}:
                continue
            if entry := self._take(PREFIX + name, tensor.shape, "what is trained in other layers"):
                found.append((tensor, entry))
        entries = {tensor.name: entry for tensor, entry in found}
        for copy, original in self._naming.copies.items():
            self._judge_tied(copy, original, entries)
        return found

    def _judge_tied(self, copy: str, original: str, entries: Mapping[str, Entry]) -> None:
        """Notes what keeps a trained table from being the head's table as well."""
        saved = is_named(module_name(original), self._config.saved)
        if original in entries and saved and not self._config.ties:
            self._problems.append(
                f"{module_name(original)} is in modules_to_save of {CONFIG}, but ensure_weight_"
                "tying is not true: PEFT trained a table apart from the head's, which in this "
                "model are one."
            )
        entry = self._left.pop(PREFIX + copy, None)
        if entry is not None and original not in entries:
            self._problems.append(
                f"{WEIGHTS} has {copy} without {original}, which in this model are one table."
            )
        elif entry is not None:
            self._problems += differing({**entries, copy: entry}, {copy: original})

    def _find_rows(self) -> dict[str, Entry]:
        """Returns the rows of tokens, by their paths."""
        found = {}
        ids = set(self._config.tokens.values())
        for rule in self._naming.rules:
            name = PREFIX + module_name(rule.theirs) + ROWS
            if name not in self._left:
                continue
            if len(ids) != 1:
                self._problems.append(
                    f"{CONFIG}: trainable_token_indices names {len(ids)} lists of tokens; "
                    "expected one, the same for all tables."
                )
            tokens = next(iter(ids), ())
            vocab, *rest = self._shapes[rule.ours]
            if len(set(tokens)) < len(tokens) or any(token >= vocab for token in tokens):
                self._problems.append(
                    f"{CONFIG}: trainable_token_indices: expected different ids below {vocab}, "
                    "which is the size of the model's table."
                )
            if entry := self._take(name, (len(tokens), *rest), "trainable_token_indices"):
                found[f"{site_of(rule)}.rows"] = entry
        if any(ids) and not found:
            self._problems.append(f"{WEIGHTS} has no rows of the tokens that {CONFIG} names.")
        return found


def _naming_of(names: Iterable[str], naming: Naming) -> Naming:
    """Returns the names that those of a file are of: of a whole, or of its text model alone."""
    if naming.alone is None:
        return naming
    layers = {rule.theirs.partition("{layer}")[0] for rule in naming.alone.rules if rule.leading}
    starts = tuple(PREFIX + start for start in layers)
    return naming.alone if any(name.startswith(starts) for name in names) else naming


def _respelt(name: str, naming: Naming) -> str:
    """Returns a name as the models of transformers 5 have it, which its older versions spelt."""
    for ours, theirs in naming.spellings:
        if theirs and name.startswith(PREFIX + theirs):
            return PREFIX + ours + name.removeprefix(PREFIX + theirs)
    return name


def _scan(folder: Path) -> tuple[dict[str, Entry], list[str]]:
    """Returns the tensors of a folder's file, and what is wrong with it."""
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(
            f"{folder} has no {WEIGHTS}"
            + (
                ", only adapter_model.bin, which jaxft does not open: such files can run programs. "
                "Load the adapter with PEFT and save it again: save_pretrained writes safetensors."
                if pickled
                else "; it is not a complete adapter of PEFT."
            )
        )
    entries, problems = scan_file(file)
    return {name: entry for name, entry in entries.items() if entry is not None}, problems


def _leading(module: Module, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the sizes of our leading axes along which each index is a module."""
    rule = module.tensor.parts[0].rule
    return shapes[rule.ours][: rule.leading]


def _read_sites(
    pairs: list[_Pair],
    shapes: Mapping[str, tuple[int, ...]],
    arrays: dict[str, np.ndarray],
    alphas: dict[str, float],
    rslora: bool,
) -> None:
    """Reads the modules of some sites, one for each layer and perhaps expert.

    Layers without a module, and what a narrow one lacks, are zeros.
    """
    module = pairs[0].module
    leading = _leading(module, shapes)
    rank = max(pair.rank for pair in pairs)
    reference = max(pairs, key=lambda pair: pair.scale)
    a = np.zeros((*leading, module.experts, rank, module.inputs), _FLOAT32)
    b = np.zeros((*leading, module.experts, module.outputs, rank), _FLOAT32)
    magnitudes = np.empty((*leading, module.outputs), _FLOAT32)
    for pair in pairs:
        index = pair.module.tensor.parts[0].index
        some_a, some_b = pair.read()
        a[index][:, : pair.rank] = some_a
        b[index][..., : pair.rank] = np.float32(pair.scale / reference.scale) * some_b
        if pair.magnitude is not None:
            magnitudes[index] = pair.magnitude.map()
    live = np.any(a != 0, axis=(*range(a.ndim - 2), a.ndim - 1))
    used = np.any(b != 0, axis=tuple(range(b.ndim - 2)))
    untrained = live & ~np.any(used, axis=0)
    for part in module.tensor.parts:
        site, rows = site_of(part.rule), module.rows(part)
        keep = np.any(used[rows], axis=0) | untrained
        if reference.magnitude is not None:
            keep[0] |= not keep.any()
        if not keep.any():
            continue
        lead, outputs, inputs = part.rule.sides(part.shape)
        kept = int(keep.sum())
        arrays[f"{site}.lora_a"] = a[..., keep, :].reshape(*leading, *lead, kept, *inputs)
        arrays[f"{site}.lora_b"] = b[..., rows, :][..., keep].reshape(
            *leading, *lead, *outputs, kept
        )
        part_of = kept / reference.rank
        alphas[site] = reference.alpha * (math.sqrt(part_of) if rslora else part_of)
        if reference.magnitude is not None:
            arrays[f"{site}.magnitude"] = magnitudes[..., rows].reshape(*leading, *outputs)

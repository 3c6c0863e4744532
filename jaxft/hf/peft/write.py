"""Writes an adapter in PEFT's format, so that other programs read it as well.

There is one rank and one scale for all modules: narrower pairs are filled up with zeros, and what
a site's scale differs by is multiplied into its B. So the programs that know no patterns compute
what PEFT computes: vLLM multiplies with alpha / r of the config, llama.cpp, which knows no rsLoRA
either, with alpha of the config over the rank of the tensor.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import ModelError
from jaxft.files import write_json
from jaxft.hf.peft.adapter import PAIRS, Adapter
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
from jaxft.hf.rules import Naming, Rule, Tensor, expand
from jaxft.hf.save import Spec, write_tensors

_FLOAT32 = np.dtype(np.float32)


def write_adapter(
    folder: Path, adapter: Adapter, naming: Naming, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Writes both files into an existing folder; each appears when it is complete.

    Experts have the names that their files have, of one module each, if current PEFT makes of them
    what the models of current transformers have: others know no other names.

    Args:
      folder: Where they go.
      adapter: What is written.
      naming: The family's names and layouts.
      shapes: Of all parameters of the base, weights as if they were dense.

    Raises:
      ModelError: If PEFT's format has no place for something in it, with all of that.
    """
    content = _Content(adapter, naming, shapes)
    write_tensors(folder / WEIGHTS, content.specs(), content.values())
    write_json(folder / CONFIG, content.config())


def check_adapter(adapter: Adapter, naming: Naming, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelError as `write_adapter` does; of the adapter's arrays only shapes are read."""
    _Content(adapter, naming, shapes)


def warning_of_experts(sites: Iterable[str], naming: Naming) -> str:
    """Returns what to know of adapters that PEFT misreads; '' if it reads all as they are.

    Args:
      sites: As for `taken_for_experts`.
      naming: Likewise.
    """
    taken = taken_for_experts(sites, naming)
    if not taken:
        return ""
    return (
        f"PEFT (0.21) takes the adapters of {', '.join(taken)} for those of the experts, and "
        "its logits will be others. Train without them (--config.adapter.targets), or export "
        "the merged model (--merge)."
    )


def taken_for_experts(sites: Iterable[str], naming: Naming) -> list[str]:
    """Returns the sites whose adapters PEFT (0.21, with transformers 5) takes for those of experts.

    It goes by the last part of a module's name where it makes one tensor of experts that are kept
    apart: a shared expert or a dense layer has the same.

    Args:
      sites: Paths of those with a pair.
      naming: The family's names and layouts.
    """
    names = {site_of(rule): module_name(rule.theirs) for rule in naming.adapter_rules}
    ends = {site: name.rpartition(".")[2] for site, name in names.items()}
    of_experts = {ends[site] for site, name in names.items() if "{expert}" in name}
    apart = (site for site in sites if "{expert}" not in names[site])
    return sorted(site for site in apart if ends[site] in of_experts)


class _Content:
    """The content of both files."""

    def __init__(self, adapter: Adapter, naming: Naming, shapes: Mapping[str, tuple[int, ...]]):
        self._adapter = adapter
        self._naming = naming
        self._rules = naming.adapter_rules
        self._shapes = shapes
        whole = adapter.whole()
        self._whole = [t for t in expand(self._rules, shapes) if _paths(t) & whole]
        sites = adapter.owners("lora_b")
        modules = find_modules(naming, self._rules, shapes)
        partners = _partners(sites, set(naming.renamed) - set(naming.adapted))
        adapted = sites | partners
        self._modules = [module for module in modules if adapted & set(module.sites)]
        if problems := [*self._homeless(sites), *self._torn(), *self._halves()]:
            raise ModelError(problems)
        parameters = [module.name for module in self._modules if module.is_parameter]
        # PEFT loads no dropout of experts; it matters in training alone.
        self._dropout = 0.0 if parameters or partners else adapter.dropout
        self._named = name_pairs(self._modules, parameters)
        self._rank = max(
            sum(self._width(site) for site in module.sites) for module in self._modules
        )
        # What most sites have, so that most are written as they are.
        scales = collections.Counter(adapter.scale(site) for site in sorted(sites))
        self._scale = max(scales, key=lambda scale: (scales[scale], scale))

    def specs(self) -> dict[str, Spec]:
        """Returns type and shape of each tensor, by its name, in the order of `values`."""
        specs = {}
        for start, module in self._named.items():
            width = module.experts * self._rank
            specs[start + A] = (_FLOAT32, (width, module.inputs))
            specs[start + B] = (_FLOAT32, (module.outputs, width))
            if self._adapter.owners("magnitude"):
                specs[start + MAGNITUDE] = (_FLOAT32, (module.outputs,))
        for name, tensor in self._saved():
            specs[PREFIX + self._as_base(name)] = (_FLOAT32, tensor.shape)
        for name, path in self._tables().items():
            specs[PREFIX + name + ROWS] = (_FLOAT32, self._adapter.arrays[path].shape)
        return specs

    def values(self) -> Iterator[np.ndarray]:
        """Yields the tensors."""
        arrays = self._adapter.arrays
        for module in self._named.values():
            yield from self._pair(module)
            if self._adapter.owners("magnitude"):
                yield self._magnitude(module)
        for _, tensor in self._saved():
            parts = [arrays[part.rule.ours][part.index] for part in tensor.parts]
            yield tensor.to_theirs(parts).astype(_FLOAT32)
        for path in self._tables().values():
            yield arrays[path].astype(_FLOAT32)

    def config(self) -> dict[str, Any]:
        """Returns the content of adapter_config.json; what old PEFTs do not know is left out."""
        adapter = self._adapter
        tables = self._tables()
        alpha = self._alpha()
        optional = {
            "target_parameters": self._targets(parameters=True),
            "trainable_token_indices": {name: list(adapter.tokens) for name in tables},
            "ensure_weight_tying": any(name in self._naming.copies for name, _ in self._saved()),
        }
        return {
            "base_model_name_or_path": adapter.base or None,
            "bias": "none",
            "fan_in_fan_out": any(_inputs_first(module) for module in self._modules),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self._dropout,
            "modules_to_save": sorted(
                {module_name(t.name) for t in self._whole if self._as_base(t.name) == t.name}
            )
            or None,
            "peft_type": "LORA",
            "r": self._rank,
            "revision": adapter.revision or None,
            "target_modules": self._target_modules(),
            "task_type": "CAUSAL_LM",
            "use_dora": bool(adapter.owners("magnitude")),
            "use_rslora": False,
            **{name: value for name, value in optional.items() if value},
        }

    def _alpha(self) -> float:
        """Returns the alpha that makes the common scale of the common rank."""
        adapter = self._adapter
        site = min(s for s in adapter.owners("lora_b") if adapter.scale(s) == self._scale)
        rank = adapter.rank(site)
        return adapter.alphas[site] * self._rank / (math.sqrt(rank) if adapter.rslora else rank)

    def _width(self, site: str) -> int:
        """Returns how many rows of A a site needs, none if it has no pair."""
        leaves = (self._adapter.arrays.get(f"{site}.{b}") for _, b, _ in PAIRS)
        return sum(leaf.shape[-1] for leaf in leaves if leaf is not None)

    def _pair(self, module: Module) -> tuple[np.ndarray, np.ndarray]:
        """Returns A and B of a module; sites without a pair have rows of zeros in its B."""
        adapter = self._adapter
        a = np.zeros((module.experts, self._rank, module.inputs), _FLOAT32)
        b = np.zeros((module.experts, module.outputs, self._rank), _FLOAT32)
        start = 0
        for part in module.tensor.parts:
            site = site_of(part.rule)
            for name_a, name_b, sign in PAIRS:
                if f"{site}.{name_a}" not in adapter.arrays:
                    continue
                some_a = module.part_a(adapter.arrays[f"{site}.{name_a}"][part.index])
                some_b = adapter.arrays[f"{site}.{name_b}"][part.index]
                columns = slice(start, start + some_a.shape[1])
                factor = np.float32(sign * adapter.scale(site) / self._scale)
                a[:, columns] = some_a
                b[:, module.rows(part), columns] = factor * module.part_b(some_b)
                start = columns.stop
        return module.join(a, b)

    def _magnitude(self, module: Module) -> np.ndarray:
        values = np.empty(module.outputs, _FLOAT32)
        for part in module.tensor.parts:
            whole = self._adapter.arrays[f"{site_of(part.rule)}.magnitude"]
            values[module.rows(part)] = whole[part.index].reshape(-1)
        return values

    def _saved(self) -> list[tuple[str, Tensor]]:
        """Returns the tensors that are there as a whole by their names, and those that are tied."""
        saved = {tensor.name: tensor for tensor in self._whole}
        copies = self._naming.copies.items()
        tied = {name: saved[other] for name, other in copies if other in saved}
        return [*saved.items(), *tied.items()]

    def _as_base(self, name: str) -> str:
        """Returns the name of a tensor that is there as a whole; an adapted one is its base."""
        owner = module_name(name)
        return f"{owner}.base_layer.weight" if PREFIX + owner in self._named else name

    def _tables(self) -> dict[str, str]:
        """Returns `{module: path of its rows}`."""
        tables = self._adapter.owners("rows")
        names = {site_of(rule): module_name(rule.theirs) for rule in self._rules}
        return {names[table]: f"{table}.rows" for table in sorted(tables)}

    def _target_modules(self) -> list[str] | str | None:
        """Returns what names all adapted modules and no others."""
        ends = self._targets(parameters=False)
        if self._naming.alone is None or not ends:
            return ends or None
        # Other towers have modules that end so: only whole names tell them apart.
        rules = {m.tensor.parts[0].rule.theirs for m in self._modules if not m.is_parameter}
        names = sorted(re.escape(module_name(name)) for name in rules)
        return re.sub(r"\\{\w+\\}", lambda _: r"\d+", "|".join(names))

    def _targets(self, *, parameters: bool) -> list[str]:
        """Returns ends of names that all adapted modules have, and no others."""
        adapted = {m.tensor.parts[0].rule.theirs for m in self._modules}
        owners = {module_name(rule.theirs) for rule in self._rules}
        others = owners - {module_name(name) for name in adapted}
        chosen = set()
        for module in self._modules:
            name = module.tensor.parts[0].rule.theirs
            if parameters and module.is_parameter:
                chosen.add(name.rpartition("}.")[2])
            elif not parameters and not module.is_parameter:
                chosen.add(_shortest_end(module_name(name), others))
        return sorted(chosen)

    def _homeless(self, sites: Set[str]) -> Iterator[str]:
        """Yields what keeps sites from being modules of theirs."""
        known = {site for module in self._modules for site in module.sites}
        for site in sorted(sites - known):
            yield (
                f"PEFT's format has no place for the adapter of {site}, which is not a linear "
                "layer. Export the merged model (--merge)."
            )
        if not sites:
            yield (
                "There is no adapter to write: PEFT's format needs at least one pair beside what "
                "is trained as a whole. Export the model itself (--merge)."
            )

    def _torn(self) -> Iterator[str]:
        """Yields the modules of which only a part is there as a whole."""
        for name in sorted({tensor.parts[0].rule.theirs for tensor in self._whole}):
            owner = module_name(name)
            inside = {
                rule.ours
                for rule in self._rules
                if rule.ours in self._shapes and rule.theirs.startswith(f"{owner}.")
            }
            inside |= {
                rule.ours
                for rule in self._rules
                if rule.ours in self._shapes and rule.theirs == name
            }
            if lacking := sorted(inside - self._adapter.whole()):
                yield (
                    f"PEFT saves modules as a whole, but of {owner} only "
                    f"{', '.join(sorted(inside & self._adapter.whole()))} is trained; not "
                    f"{', '.join(lacking)}. Export the merged model (--merge)."
                )

    def _halves(self) -> Iterator[str]:
        """Yields the modules to which DoRA does not apply as a whole."""
        dora = self._adapter.owners("magnitude")
        for sites, parameter in sorted({(m.sites, m.is_parameter) for m in self._modules}):
            if dora and parameter:
                yield (
                    f"PEFT has no DoRA of parameters that hold all experts, as {', '.join(sites)} "
                    "are. Export the merged model (--merge)."
                )
            elif dora and (lacking := [site for site in sites if site not in dora]):
                yield (
                    f"In PEFT's format all adapters are DoRA's or none: {', '.join(lacking)} "
                    f"{'has' if len(lacking) == 1 else 'have'} no magnitude"
                    f"{', and is one module with others' if len(sites) > 1 else ''}. Adapt it "
                    "as well (--config.adapter.targets), or export the merged model (--merge)."
                )


def _partners(sites: Set[str], renamed: Iterable[Rule]) -> set[str]:
    """Returns the sites that one module holds together with these in renamed models.

    What PEFT makes of adapters of single experts is an adapter of all parameters of that module.
    """
    groups: dict[str, set[str]] = collections.defaultdict(set)
    for rule in renamed:
        groups[module_name(rule.theirs)].add(site_of(rule))
    return {site for group in groups.values() if group & sites for site in group}


def _paths(tensor: Tensor) -> set[str]:
    return {part.rule.ours for part in tensor.parts}


def _inputs_first(module: Module) -> bool:
    """Whether the module's weight has its inputs first, as GPT-2's have."""
    outputs, inputs = module.tensor.parts[0].rule.matrix or (0, 1)
    return inputs < outputs and not module.is_parameter


def _shortest_end(name: str, others: Iterable[str]) -> str:
    """Returns the last components of a name, as few as set it apart from the other names."""
    components = name.split(".")
    ends = (".".join(components[-count:]) for count in range(1, len(components)))
    return next((end for end in ends if not any(is_named(o, (end,)) for o in others)), name)

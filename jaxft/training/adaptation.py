"""The adapters that a run asks for, on the model that it has."""

from collections.abc import Sequence
from dataclasses import replace

from jaxft.config import AdapterConfig, RunConfig
from jaxft.errors import ConfigError
from jaxft.models.adapters import Adaptation, choose_sites, site_problems, weights_in
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.module import without_memory
from jaxft.models.quantised import DTYPES


def as_run(
    architecture: Architecture, config: RunConfig, added: Sequence[int] | None = None
) -> Architecture:
    """Returns a model as a run holds it: what is learnt beside it, and the type of its weights.

    Args:
      architecture: Of the model; adapters that it has already stay.
      config: The run.
      added: Ids of the tokens of `model.add_tokens`; where no tokenizer was read, they are taken to
        have the first ids.

    Raises:
      ConfigError: If the run asks for what the model does not have.
    """
    model = config.model
    if not architecture.adaptation:
        added = range(len(model.added_tokens)) if added is None else added
        architecture = adapted(architecture, config.adapter, added=added, whole=model.random_init)
    return quantised(architecture, model.quantise)


def adapted(
    architecture: Architecture,
    config: AdapterConfig,
    *,
    added: Sequence[int] = (),
    whole: bool = False,
) -> Architecture:
    """Returns the model with what is learnt beside it; the same one if the run trains all of it.

    Args:
      architecture: Of the model.
      config: What the run asks for.
      added: Ids of the tokens of `model.add_tokens`.
      whole: Whether checkpoints hold the model's own weights too.

    Raises:
      ConfigError: If it asks for what the model does not have.
    """
    if not config.is_used:
        return architecture
    model = without_memory(architecture.build(make_numerics("float32")))
    names = {
        rule.ours.removesuffix(".w"): rule.theirs.removesuffix(".weight")
        for rule in architecture.naming.rules
        if rule.ours.endswith(".w")
    }
    sites = {}
    if config.rank or config.ranks:
        sites = choose_sites(
            weights_in(model),
            names,
            targets=config.targets,
            rank=config.rank,
            alpha=config.alpha,
            ranks=config.ranks_by_pattern(),
            alphas=config.alphas_by_pattern(),
            rslora=config.scaling == "rslora",
            magnitude=config.dora,
            dropout=config.dropout,
            start=config.start,
        )
    rows = tuple(added) if config.added_rows else ()
    adaptation = Adaptation(sites, config.start, rows, config.train, whole)
    if not adaptation:
        raise ConfigError(
            f"adapter.ranks {config.ranks!r} leaves no weight an adapter: every rank is 0, and "
            "nothing else of adapter.* is learnt. Name a rank above 0, or leave the keys out to "
            "train all of the model."
        )
    axes = architecture.abstract(make_numerics("float32")).axes
    if config.train and not any(adaptation.is_learnt(path) for path in axes):
        raise ConfigError(
            f"adapter.train {config.train!r} matches no parameter; paths are {', '.join(axes)}."
        )
    tables = [path for path in axes if axes[path] == ("vocab", "embed")]
    if rows and (tables := list(filter(adaptation.is_learnt, tables))):
        raise ConfigError(
            f"adapter.train {config.train!r} trains all of {', '.join(tables)}, and "
            "adapter.added_rows its rows of added tokens apart. Leave one of the two out."
        )
    return replace(architecture, adaptation=adaptation)


def quantised(architecture: Architecture, kind: str) -> Architecture:
    """Returns the model with the weights of its layers in codes; the same one for no kind.

    Raises:
      ConfigError: If there is no such kind, or one of them trains itself.
    """
    if not kind:
        return architecture
    if kind not in DTYPES:
        raise ConfigError(f"quantise is {kind!r}; expected one of {', '.join(DTYPES)}, or ''.")
    found = replace(architecture, quantise=kind)
    dense, coded = (
        part.abstract(make_numerics("float32")).params for part in (architecture, found)
    )
    adaptation = architecture.adaptation
    learnt = [path for path in dense if path not in coded and adaptation.is_learnt(path)]
    if learnt:
        raise ConfigError(
            f"adapter.train {adaptation.trained!r} matches {', '.join(learnt)}, which "
            f"model.quantise {kind!r} holds in codes that cannot train. Give them adapters by "
            "adapter.targets, or leave model.quantise out."
        )
    return found


def with_dropout(architecture: Architecture, rate: float) -> Architecture:
    """Returns a model whose adapters, which another run or program made, drop inputs as asked for.

    Raises:
      ConfigError: If one of them cannot.
    """
    adaptation = architecture.adaptation
    sites = {path: replace(site, dropout=rate) for path, site in adaptation.sites.items()}
    if rate:
        weights = weights_in(without_memory(architecture.plain.build(make_numerics("float32"))))
        if problems := site_problems(sites, weights, adaptation.start):
            raise ConfigError(problems)
    return replace(architecture, adaptation=replace(adaptation, sites=sites))

"""Between adapters as files hold them and as models have them."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.errors import collected
from jaxft.hf.peft.adapter import Adapter
from jaxft.hf.peft.write import check_adapter
from jaxft.models.adapters import Adaptation
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.weights import Site


def adaptation_of(adapter: Adapter) -> Adaptation:
    """Returns what an adapter of files is made of, without its values."""
    magnitudes, starts = adapter.owners("magnitude"), adapter.owners("start_a")
    sites = {
        site: Site(
            adapter.rank(site),
            adapter.alphas[site],
            rslora=adapter.rslora,
            magnitude=site in magnitudes,
            start=site in starts,
        )
        for site in sorted(adapter.owners("lora_b"))
    }
    whole = "|".join(f"^{re.escape(path)}$" for path in sorted(adapter.whole()))
    return Adaptation(sites, rows=adapter.tokens, trained=whole)


def format_problems(architecture: Architecture) -> list[str]:
    """Returns what keeps the adapter of a model from being written in PEFT's format."""
    dense, adaptation = replace(architecture, quantise=""), architecture.adaptation
    numerics, problems = make_numerics("float32"), []
    learnt = {p: s for p, s in dense.abstract(numerics).params.items() if adaptation.is_kept(p)}
    shapes = {path: spec.shape for path, spec in dense.plain.abstract(numerics).params.items()}
    with collected(problems):
        adapter = adapter_of(adaptation, learnt, base="", revision="")
        check_adapter(adapter, architecture.naming, shapes)
    return problems


def adapter_of(
    adaptation: Adaptation, arrays: Mapping[str, Any], *, base: str, revision: str
) -> Adapter:
    """Returns the adapter of a model as files hold it.

    Args:
      adaptation: What it is made of.
      arrays: Its values, float32: `{path: array}` of all leaves and further trained parameters.
      base: Name or path of the model that it is made for.
      revision: Revision of the base's repository; empty for none.
    """
    sites = adaptation.sites
    return Adapter(
        arrays,
        {path: site.alpha for path, site in sites.items()},
        rslora=any(site.rslora for site in sites.values()),
        tokens=adaptation.rows,
        dropout=max((site.dropout for site in sites.values()), default=0.0),
        base=base,
        revision=revision,
    )

"""Between adapters as files hold them and as models have them."""

import re
from collections.abc import Mapping

import numpy as np

from jaxft.hf.peft.adapter import Adapter
from jaxft.models.adapters import Adaptation
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


def adapter_of(
    adaptation: Adaptation, arrays: Mapping[str, np.ndarray], *, base: str, revision: str
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

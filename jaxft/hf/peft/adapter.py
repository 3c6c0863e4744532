"""An adapter apart from any model: its arrays, and what they are multiplied with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# Leaves that train, and those that an adapter began with, which are subtracted.
TRAINED_LEAVES = ("lora_a", "lora_b", "magnitude", "rows")
START_LEAVES = ("start_a", "start_b")
LEAVES = (*TRAINED_LEAVES, *START_LEAVES)
# Pairs of leaves that are multiplied, and the sign of their product.
PAIRS = (("lora_a", "lora_b", 1), ("start_a", "start_b", -1))


@dataclass(frozen=True)
class Adapter:
    """All that is trained beside, or in place of, a base model's parameters.

    Attributes:
      arrays: `{path: array}`, float32. Of a site: `SITE.lora_a` `[lead…, r, *in]` and `SITE.lora_b`
        `[lead…, *out, r]`; perhaps `SITE.start_a` and `SITE.start_b`, a pair that is subtracted
        (PiSSA), and `SITE.magnitude` `[lead…, *out]` (DoRA). `TABLE.rows` `[n, D]` of tokens. And
        whole parameters by their own paths.
      alphas: `{site: alpha}`: a site adds alpha / r times its pair.
      rslora: Whether it is alpha / sqrt(r) times its pair instead.
      tokens: Ids of the rows, in their order.
      dropout: Probability that an input of a pair is dropped in training.
      base: Name or path of the base model; empty if unknown.
      revision: Revision of the base's repository; empty if unknown.
    """

    arrays: Mapping[str, np.ndarray]
    alphas: Mapping[str, float]
    rslora: bool = False
    tokens: tuple[int, ...] = ()
    dropout: float = 0.0
    base: str = ""
    revision: str = ""

    def owners(self, leaf: str) -> set[str]:
        """Returns the sites, or the tables, that have a leaf."""
        ending = f".{leaf}"
        return {path.removesuffix(ending) for path in self.arrays if path.endswith(ending)}

    def whole(self) -> set[str]:
        """Returns the paths of the parameters that are there as a whole."""
        return {path for path in self.arrays if path.rpartition(".")[2] not in LEAVES}

    def rank(self, site: str) -> int:
        """Returns the rank of a site's pair."""
        return self.arrays[f"{site}.lora_b"].shape[-1]

    def scale(self, site: str) -> float:
        """Returns what a site's pair is multiplied with."""
        rank = self.rank(site)
        return self.alphas[site] / (math.sqrt(rank) if self.rslora else rank)

"""Keys of adapters."""

from dataclasses import dataclass

from jaxft.config.keys import key
from jaxft.config.values import numbers_by_pattern
from jaxft.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """Learning beside a model whose own weights stay as they are."""

    rank: int = key(
        0,
        "Width of low-rank adapters (LoRA); 0: none, all of the model is trained.",
        minimum=0,
        maximum=65536,
    )
    path: str = key(
        "",
        "Run, or folder in PEFT's format, of an adapter of model.path that training goes on from; "
        "rank, alpha and all else but dropout are those of the adapter.",
    )
    alpha: float = key(
        0.0,
        "Numerator of their scale, which is alpha / rank; 0: twice the rank.",
        minimum=0,
    )
    targets: str = key(
        "",
        "Regular expression searched in paths of weights, such as layers.attn.q, and in their "
        "names in files, such as q_proj: those that get an adapter. Empty: every linear layer of "
        "the blocks, those of experts included, but no router.",
    )
    ranks: str = key(
        "", "Ranks of weights by pattern, the first that matches: 'mlp=8,attn=16'; 0: no adapter."
    )
    alphas: str = key("", "Numerators of the scale by pattern, in the same form.")
    dropout: float = key(
        0.0, "Share of the adapters' inputs that a step drops.", minimum=0, maximum=0.99
    )
    scaling: str = key(
        "standard",
        "Scale of adapters: 'standard' is alpha / rank, 'rslora' alpha / sqrt(rank).",
        choices=("standard", "rslora"),
    )
    dora: bool = key(False, "Learn the norm of each output's weights apart (DoRA).")
    start: str = key(
        "zero",
        "What adapters start from, none of which changes the model: 'zero' has a first matrix of "
        "chance and a second of zeros, 'pissa' the largest singular values of the weight, whose "
        "part is subtracted, 'orthogonal' two matrices whose product is zero.",
        choices=("zero", "pissa", "orthogonal"),
    )
    train: str = key(
        "",
        "Regular expression searched in parameter paths: further parameters of the model that "
        "train as well, such as 'norm' or '^head'.",
    )
    added_rows: bool = key(
        False, "Train the rows of the tokens of model.add_tokens, and no other row of the tables."
    )

    def ranks_by_pattern(self) -> dict[str, int]:
        """Returns the ranks of `ranks` by pattern, in order.

        Raises:
          ConfigError: If the text is not of that form, or a rank no whole number.
        """
        found = numbers_by_pattern("adapter.ranks", self.ranks)
        parts = [f"{pattern}={rank:g}" for pattern, rank in found.items() if rank % 1]
        if parts:
            raise ConfigError(f"adapter.ranks has {', '.join(parts)}; expected whole numbers.")
        return {pattern: int(rank) for pattern, rank in found.items()}

    def alphas_by_pattern(self) -> dict[str, float]:
        """Returns the numerators of `alphas` by pattern, in order.

        Raises:
          ConfigError: If the text is not of that form, or one is 0, with which nothing trains.
        """
        found = numbers_by_pattern("adapter.alphas", self.alphas)
        parts = [f"{pattern}=0" for pattern, alpha in found.items() if not alpha]
        if parts:
            raise ConfigError(
                f"adapter.alphas has {', '.join(parts)}; expected numbers above 0. For no adapter "
                "there, set the rank to 0 by adapter.ranks."
            )
        return found

    @property
    def is_used(self) -> bool:
        """Whether something is learnt beside the model, and not all of it."""
        return bool(self.path or self.rank or self.ranks or self.train or self.added_rows)

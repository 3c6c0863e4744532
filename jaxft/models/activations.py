"""Names of what a layer can keep from its forward pass for its backward pass."""

from jaxft.errors import ConfigError, nearest

# The residual stream that enters a layer; it is always kept, on the device or on the host.
INPUTS = "inputs"
# Queries, keys and values, turned by their positions.
QKV = "qkv"
# What attention returns, and its log-sums where a kernel makes them.
ATTENTION = "attention"
# The output projection of attention.
ATTENTION_OUT = "attention_out"
# Products of the feed-forward part with its first weights; of experts all products.
MLP = "mlp"
# What the feed-forward part adds to the stream.
MLP_OUT = "mlp_out"

# The result of a product of 8-bit numbers, which `dots` keeps and no setting names.
PRODUCT = "product"

ALL = (INPUTS, QKV, ATTENTION, ATTENTION_OUT, MLP, MLP_OUT)
# Settings that say by a rule, and not by names, what is kept.
RULES = ("none", "dots", "full")
# The setting that leaves it to the planner which policy a run takes.
AUTO = "auto"


def check(remat: str, offload: str) -> None:
    """Raises ConfigError for settings of `model.remat` and `model.offload` that no run can have."""
    if remat != AUTO:
        kept(remat)
        offloaded(remat, offload)
    elif offload:
        raise ConfigError(
            f"model.offload is {offload!r}, but what is kept is not known before model.remat "
            "'auto' has chosen it. Name it, such as --config.model.remat=full, or leave "
            "model.offload out."
        )


def kept(remat: str) -> frozenset[str]:
    """Returns the activations that a setting of `model.remat` names; a rule names none.

    Raises:
      ConfigError: If there is no such activation, or none was chosen yet.
    """
    if remat in RULES:
        return frozenset()
    if remat == AUTO:
        raise ConfigError(
            "model.remat is 'auto', for which `jaxft train` and `jaxft plan` alone choose a "
            "policy. Name one here, such as --config.model.remat=full."
        )
    return _names("model.remat", remat, ALL[1:], (*RULES, AUTO))


def offloaded(remat: str, offload: str) -> frozenset[str]:
    """Returns the activations that `model.offload` moves to the host.

    Raises:
      ConfigError: If there is no such activation, or it is not kept at all.
    """
    if not offload:
        return frozenset()
    found = _names("model.offload", offload, ALL, ())
    if remat in ("none", "dots"):
        raise ConfigError(
            f"model.offload is {offload!r}, but model.remat {remat!r} keeps activations "
            "that have no names. Use --config.model.remat=full, or name what is kept."
        )
    if unkept := found - kept(remat) - {INPUTS}:
        raise ConfigError(
            f"model.offload names {', '.join(sorted(unkept))}, which model.remat {remat!r} does "
            f"not keep. Set --config.model.remat={'+'.join(sorted(kept(remat) | unkept))}."
        )
    return found


def _names(key: str, text: str, known: tuple[str, ...], rules: tuple[str, ...]) -> frozenset[str]:
    names = text.split("+")
    unknown = [name for name in names if name not in known]
    if unknown:
        either = f"one of {', '.join(rules)}, or " if rules else ""
        raise ConfigError(
            f"{key} is {text!r}; expected {either}names joined by '+' out of {', '.join(known)}."
            f"{nearest(unknown[0], (*known, *rules), cutoff=0.6)}"
        )
    return frozenset(names)

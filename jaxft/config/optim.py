"""Keys of the optimizer."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxft.config.keys import key, walk
from jaxft.config.values import numbers_by_pattern
from jaxft.errors import collected

# Keys that an optimizer does not read.
_UNUSED = {
    "adamw": ("momentum",),
    "adafactor": ("beta1", "beta2", "epsilon", "momentum", "moments"),
    "lion": ("epsilon", "momentum"),
    "muon": (),
    "sgd": ("beta1", "beta2", "epsilon"),
    "schedule_free": ("momentum", "ema"),
}


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer, learning rates, clipping, freezing, and the average of weights."""

    name: str = key(
        "adamw",
        "Optimizer. 'adafactor' keeps sums of rows and columns in place of moments; 'lion' keeps "
        "one moment and takes steps of equal size: a tenth to a third of AdamW's rate; 'muon' "
        "orthogonalises the steps of the layers' matrices, scaled to the size of AdamW's, and "
        "leaves all else to AdamW; 'sgd' has momentum; 'schedule_free' is AdamW whose average is "
        "evaluated and exported, with schedule=constant.",
        choices=tuple(_UNUSED),
    )
    learning_rate: float = key(1e-5, "Peak learning rate.", minimum=0)
    schedule: str = key(
        "cosine",
        "Course after warm-up; 'wsd' is warm-up, stable, decay.",
        choices=("constant", "linear", "cosine", "wsd"),
    )
    warmup_steps: int = key(0, "Steps of linear warm-up from zero.", minimum=0)
    decay_fraction: float = key(
        0.2, "For 'wsd': share of all steps spent in the decay.", minimum=0, maximum=1
    )
    final_ratio: float = key(
        0.0, "Last learning rate as a share of the peak.", minimum=0, maximum=1
    )
    weight_decay: float = key(
        0.01, "Decoupled decay, times the learning rate; never on norms and biases.", minimum=0
    )
    beta1: float = key(
        0.9,
        "Decay of the first moment; of schedule_free the share of the average in the weights that "
        "gradients are taken at.",
        minimum=0,
        maximum=0.999999,
    )
    beta2: float = key(
        0.95,
        "Decay of the second moment; of lion that of its only one.",
        minimum=0,
        maximum=0.999999,
    )
    epsilon: float = key(1e-8, "Added to the root of the second moment.", minimum=1e-30)
    momentum: float = key(
        0.95, "Decay of the sum of gradients of sgd and muon.", minimum=0, maximum=0.999999
    )
    moments: str = key(
        "",
        "Type in which moments are kept between steps; empty: that of the parameter. 'bfloat16' "
        "rounds second moments up or down by chance; 'int8' keeps matrices in blocks of 64 numbers "
        "or more with a scale each, and the rest in float32.",
        choices=("", "float32", "bfloat16", "int8"),
    )
    clip_norm: float = key(1.0, "Largest global gradient norm; 0: no clipping.", minimum=0)
    freeze: str = key(
        "", "Regular expression searched in parameter paths; what matches is not trained."
    )
    rates: str = key(
        "",
        "Factors of the learning rate, 'pattern=factor,…': regular expressions searched in "
        "parameter paths, of which the first that matches counts. 0 leaves a parameter as it is.",
    )
    layer_decay: float = key(
        1.0,
        "Factor of the learning rate from each layer to the one below: it is 1 after the last "
        "layer, layer_decay in it, and layer_decay^(L+1) in the embedding.",
        minimum=1e-30,
        maximum=1,
    )
    lora_plus: float = key(
        1.0,
        "Learning rate of an adapter's B over that of its A (LoRA+); its authors advise 16.",
        minimum=1e-30,
    )
    ema: float = key(
        0.0,
        "Decay of an exponential moving average of the weights, float32, that is evaluated and "
        "exported in their place; min(ema, (1 + t) / (10 + t)) in step t. 0: none.",
        minimum=0,
        maximum=0.999999,
    )

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with combinations of keys."""
        for item in walk(self):
            if item.path in _UNUSED.get(self.name, ()) and item.value != item.default:
                yield f"optim.{item.path} is set, but {self.name} does not use it; leave it out."
        if self.name == "schedule_free":
            if self.schedule != "constant":
                yield (
                    f"optim.schedule is {self.schedule!r}, but schedule_free averages in place of "
                    "a decay. Set --config.optim.schedule=constant."
                )
            if not self.beta1:
                yield "optim.beta1 is 0; schedule_free needs a share of its average above 0."
        problems: list[str] = []
        with collected(problems):
            self.factors()
        yield from problems

    def factors(self) -> dict[str, float]:
        """Returns the factors of `rates` by pattern, in order.

        Raises:
          ConfigError: If the text is not of that form.
        """
        return numbers_by_pattern("optim.rates", self.rates)

"""The matrix products of a run in closed form: how many there are, and how fast they are made."""

import math
from typing import NamedTuple

from jaxft.models import activations as names
from jaxft.planner.footprint import HEADS, Footprint
from jaxft.planner.kernels import efficiency, mean_visible_pairs
from jaxft.planner.placed import Weight
from jaxft.sharding.scaled import rate


class Work(NamedTuple):
    """FLOPs of one device in one micro-batch, forward and backward.

    Attributes:
      layers: Products of layers in the type of computing, but those of the delta rule.
      rounded: Products of layers in that of `model.matmul`.
      head: Products with the head.
      attention: Products of queries, keys and values.
      recurrence: Products of the delta rule.
    """

    layers: float
    rounded: float
    head: float
    attention: float
    recurrence: float


class Reached(NamedTuple):
    """FLOP/s: peaks, and what is reached of them.

    Attributes:
      peak: Peak of the type of computing.
      rounded_peak: Peak of the type of `model.matmul`.
      products: Rate of products with weights.
      rounded: Rate of those in the type of `model.matmul`.
      scores: Rate of attention's products.
    """

    peak: float
    rounded_peak: float
    products: float
    rounded: float
    scores: float


class Products(Footprint):
    """The footprint of a run, and its products."""

    def _rates_of_products(self) -> Reached:
        peak = self.chip.exact if self.itemsize == 4 else self.chip.bfloat16
        rounded = rate(self.matmul, self.chip) if self.matmul else peak
        share = self.chip.product_share
        flash = efficiency(self.chip, self.model.head_dim) if self.placed.flash else share
        return Reached(peak, rounded, peak * share, rounded * share, peak * flash)

    def _products(self) -> dict[str, float]:
        """Returns multiplications of each token in one layer's products, forward."""
        embed, widths = self.model.embed, self._widths
        return {
            names.QKV: sum(n * of for _, n, of in self._between(*HEADS, reads=True)),
            names.ATTENTION_OUT: embed * self._made_of_heads(reads=False),
            names.MLP: embed * widths[names.MLP],
            names.MLP_OUT: embed * self.hidden,
        }

    def _read_back(self) -> float:
        """Returns those of the products behind the hidden width that the backward pass reads.

        Where no norm and no gate of its own reads the whole, these are of outputs of experts.
        """
        if self.placed.reads_all_mlp_out:
            return self.model.embed * self.hidden
        return sum(n * of for w, n, of in self._between("mlp", reads=False) if w.routed)

    def _pairs(self) -> float:
        """Returns pairs of query and key of one device that a layer with attention multiplies."""
        if self.placed.flash:
            return self.tokens / self.length * mean_visible_pairs(self.model, self.length)
        return self.tokens * self.length

    def _work(self) -> Work:
        """Returns the FLOPs of weights and of attention on one device in a micro-batch."""
        products = self._products()
        forward, beside = sum(products.values()), self._beside()
        # Forward and again, and gradients of what products read; those of weights that are trained.
        own = forward * (1 + self.back)
        own += sum(products[name] for name in self.again - {names.ATTENTION, names.MLP_OUT})
        own += self._read_back() * (names.MLP_OUT in self.again)
        layer = forward * self.back * self._trained_share()
        layer += sum(m * (1 + self.back * (1 + trained)) for m, trained in beside)
        layer += sum(m for m, _ in beside) * bool(self.again)
        layer += self._of_own_inputs()
        # Forward, and two gradients, before which all but cross entropy makes logits once more.
        again = not self.config.objective.objective.is_cross_entropy
        head = 1 + self.learns * (again + self.placed.passes_head + self.placed.head.trained)
        # Products with keys and with values. The kernels of flash attention make scores once more
        # for the gradients; two, on a TPU that has not one for all of them, make each its own, and
        # what scores pass on to values.
        of_keys = of_values = 1 + 2 * self.back
        of_keys += self.back * self.placed.flash
        if self.placed.flash and self.is_tpu and not self.chip.fuses:
            of_keys, of_values = of_keys + self.back, of_values + self.back
        if names.ATTENTION in self.again:
            of_keys, of_values = of_keys + 1, of_values + 1
        elif self.remat != "none" and not self.placed.flash:
            of_keys += self.back  # scores of whole rows are kept by no other setting
        if self.stages > 1:  # forward again, with the micro-batch's inputs alone
            own += self.back * forward
            layer += self.back * sum(m for m, _ in beside)
            of_keys, of_values = of_keys + self.back, of_values + self.back
        layer, rounded = (layer, own) if self.matmul else (layer + own, 0.0)
        rule = self._recurrent
        pairs = self.attending * self._pairs() * self._heads()
        layers = self.model.attending
        attention = sum(of_keys * one.head_dim + of_values * one.value_dim for one in layers)
        attention /= len(layers)
        return Work(
            layers=2 * self.tokens * self.layers * layer,
            rounded=2 * self.tokens * self.layers * rounded,
            head=2 * self.tokens * head * self.model.embed * self._vocab(),
            attention=2 * attention * pairs * self.layers,
            recurrence=2 * self._of_rule(rule.forward, rule.backward),
        )

    def _of_rule(self, forward: float, backward: float) -> float:
        """Returns what layers take in a micro-batch of what the delta rule takes of a token.

        Args:
          forward: In a forward pass.
          backward: In the backward pass.
        """
        runs = 1 + self.back * ((names.ATTENTION in self.again) + (self.stages > 1))
        return self.tokens * self.layers * (forward * runs + backward * self.back)

    def _met(self, weight: Weight) -> float:
        """Returns the numbers of a weight that a token is multiplied with, the mean of layers."""
        experts = self.model.experts
        met = self.chosen / experts.count if experts and weight.routed else 1.0
        return math.prod(weight.shape) * met * weight.share

    def _trained_share(self) -> float:
        """Returns the share of the model's own weights, as tokens meet them, with a gradient."""
        weights = (w for w in self.placed.weights if not (w.beside or "per_layer" in w.axes))
        sizes = [(self._met(w), w.trained) for w in weights]
        return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)

    def _of_own_inputs(self) -> float:
        """Returns multiplications of each token with what makes and reads inputs of one layer."""
        again = self.back * (self.remat not in ("none", "dots"))
        found = sum(
            self._met(weight) * (1 + self.back * (1 + weight.trained) + again)
            for weight in self.placed.weights
            if "per_layer" in weight.axes and not weight.beside
        )
        if (projection := self.placed.projection) is not None:
            runs = projection.trained + bool(self.placed.trained_tables)
            runs += self.placed.reaches_own_inputs and self.remat != "none"
            found += math.prod(projection.shape) * (1 + self.learns * runs) / self.model.layers
        return found

    def _beside(self) -> list[tuple[float, bool]]:
        """Returns multiplications of each token with adapters of one layer, and which train.

        Experts lie along the devices that tokens travel between, each of which has its share.
        """
        found = []
        for weight in self.placed.weights:
            if weight.beside:
                cut = weight.plan.held[weight.routed :]
                found.append((self._met(weight) / self._parts(cut), weight.trained))
        return found

    def _codes(self) -> float:
        """Returns bytes of the codes that are made of a token in a layer, one after another.

        Of what products read, forward and again; and backward of the gradients of what they make.
        """
        heads = self._made_of_heads(reads=False)
        stream, widths = self._widths[names.INPUTS], self._widths
        read = 2 * stream + heads + self.hidden
        made = widths[names.QKV] + widths[names.MLP] + 2 * stream
        return read * (1 + bool(self.again)) + made * self.back

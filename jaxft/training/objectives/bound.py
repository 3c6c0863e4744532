"""An objective with the keys of a run, as the steps use it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.config import ObjectiveConfig
from jaxft.data.batch import Batch
from jaxft.errors import ConfigError
from jaxft.models.experts import balance_loss
from jaxft.models.layers import Routing
from jaxft.training.objectives.contract import Objective, Scores, Terms
from jaxft.training.objectives.recorded import RECORDED
from jaxft.training.objectives.token_scores import Predictor, cross_entropy, token_scores

_ENDS = ("low", "high")  # of an interval, in eval.jsonl


class Judged(NamedTuple):
    """The sums of a micro-batch that a step adds up.

    Attributes:
      terms: The objective's sums.
      auxiliary: Load-balancing loss of the micro-batch, times its weight, minimised beside them.
      routing: Work of all layers' routers, or None without experts.
    """

    terms: Terms
    auxiliary: Any = 0.0
    routing: Routing | None = None

    @property
    def minimised(self) -> Any:
        """The scalar that gradients are taken of."""
        return self.terms.total + self.auxiliary

    def __add__(self, other: Any) -> "Judged":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adds sum by sum (a tuple's own `+` would concatenate)."""
        return jax.tree.map(lambda a, b: a + b, self, other)


class _Scored:
    """A model as an objective sees it, whether its layers run here or in stages."""

    def __init__(self, model: Predictor, chunk: int, max_units: int):
        self._model, self._chunk, self.max_units = model, chunk, max_units
        self.routing: Routing | None = None

    def scores(self, batch: Batch) -> Scores:
        """Returns the scores of trained targets, and keeps what routers did."""
        return token_scores(*self._run(batch), chunk=self._chunk)

    def cross_entropy(self, batch: Batch) -> Terms:
        """Returns the weighted nats of all targets, and keeps what routers did."""
        return cross_entropy(*self._run(batch), chunk=self._chunk)

    def _run(self, batch: Batch) -> tuple[Predictor, Array, Array, Array]:
        hidden, self.routing = self._model.hidden(
            batch.tokens, batch.positions, batch.segments, batch.get("seeds")
        )
        return self._model, hidden, batch.targets, batch.weights


@dataclass(frozen=True, kw_only=True)
class BoundObjective:
    """An objective and what a run says of it.

    Attributes:
      objective: The mathematics.
      keys: Keys of the objective.
      chunk: Positions of a device whose float32 logits exist at once; 0 for all.
      balance: Weight of the load-balancing loss. It is judged over the tokens of a micro-batch.
      max_units: Most units of one row.
      name: Name in the run's config; empty for one that no run names.
    """

    objective: Objective
    keys: Any
    chunk: int
    balance: float = 0.0
    max_units: int = 1
    name: str = ""

    def judge(self, model: Predictor, batch: Batch) -> Judged:
        """Returns what the rows of a micro-batch add to a training step.

        Raises:
          ConfigError: If a figure has a name that records have already, or a sum another shape.
        """
        policy = self._policy(model)
        terms = self._checked(self.objective.loss(policy, batch, self.keys))
        _check_shapes(terms, [()], f"loss of objective {self.name!r}", "Return sums over the batch")
        auxiliary = jnp.zeros((), jnp.float32)
        if policy.routing is not None and self.balance:
            auxiliary = self.balance * terms.weight * balance_loss(policy.routing)
        return Judged(terms, auxiliary, policy.routing)

    def rows(self, model: Predictor, batch: Batch) -> Terms:
        """Returns the sums of each row or unit.

        Raises:
          ConfigError: If a figure has a name that records have already, or a sum another shape.
        """
        terms = self._checked(self.objective.rows(self._policy(model), batch, self.keys))
        shapes = [batch.tokens.shape[:1], (*batch.tokens.shape[:1], self.max_units)]
        remedy = "Return sums of each row [B] or of each unit [B, U]"
        _check_shapes(terms, shapes, f"rows of objective {self.name!r}", remedy)
        return terms

    def whole(self, model: Predictor, batch: Batch) -> dict[str, tuple[Any, Any]]:
        """Returns this micro-batch's part of what the loss must know of all of them."""
        assert self.objective.whole is not None
        return self.objective.whole(self._policy(model), batch, self.keys)

    def log_probs(self, model: Predictor, batch: Batch) -> Float[Array, "B T"]:
        """Returns the log-probability that a model gives each target."""
        return self._policy(model).scores(batch).log_probs

    def _checked(self, terms: Terms) -> Terms:
        intervals = {f"{name}_{end}" for name in (*RECORDED, *terms.figures) for end in _ENDS}
        if taken := sorted(terms.figures.keys() & (RECORDED | intervals)):
            raise ConfigError(
                [
                    f"objective {self.name!r} names a figure {name!r}, which records have already; "
                    "rename it."
                    for name in taken
                ]
            )
        return terms

    def _policy(self, model: Predictor) -> _Scored:
        return _Scored(model, self.chunk, self.max_units)


def _check_shapes(terms: Terms, shapes: Sequence[tuple[int, ...]], what: str, remedy: str) -> None:
    """Raises `ConfigError` unless all sums have the shape of the total, one of those given."""
    sums = {"total": terms.total, "weight": terms.weight}
    for name, (total, count) in terms.figures.items():
        sums |= {f"figure {name!r}, sum": total, f"figure {name!r}, count": count}
    found = {name: jnp.shape(value) for name, value in sums.items()}
    expected = [found["total"]] if found["total"] in shapes else shapes
    wrong = [f"{name} {list(shape)}" for name, shape in found.items() if shape not in expected]
    if wrong:
        raise ConfigError(
            f"The {what} has the shapes {', '.join(wrong)}; expected "
            f"{' or '.join(str(list(shape)) for shape in expected)}. {remedy}, never means."
        )


def bind(config: ObjectiveConfig, *, max_units: int = 1) -> BoundObjective:
    """Returns the objective that a run names, with its keys."""
    return BoundObjective(
        objective=config.objective,
        keys=config.keys,
        chunk=config.chunk,
        balance=config.balance,
        max_units=max_units,
        name=config.name,
    )

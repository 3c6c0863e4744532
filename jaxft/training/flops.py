"""Operations that the mathematics of a training step needs."""

from typing import NamedTuple


class TrainingFlops(NamedTuple):
    """Operations that the mathematics of a step needs, in the two usual ways of counting.

    Attributes:
      causal: Attention scores counted once for each pair that may see each other: about half.
      full: Attention counted as if each token saw its whole document, as most papers do.
    """

    causal: float
    full: float


class Learning(NamedTuple):
    """The parts of a model that learn, as counts.

    Attributes:
      trained: Parameters that have a gradient, of those that tokens are multiplied with.
      passed: Parameters that gradients pass on their way back.
      attends_back: Whether they pass attention.
      head: Parameters of the head.
      head_products: Products with it for each token: forward, and for the gradients that are made.
    """

    trained: int
    passed: int
    attends_back: bool
    head: int = 0
    head_products: int = 0


def training_flops(
    parameters_without_embedding: int,
    *,
    learning: Learning | None = None,
    layers: int,
    heads: int,
    head_dim: float,
    tokens: int,
    squared_lengths: float,
    states: int = 0,
    untrained_tokens: float = 0.0,
    forward_passes: int = 0,
) -> TrainingFlops:
    """Returns the FLOPs of a forward and a backward pass over some documents.

    A weight takes part in one multiplication and one addition per token forward, and twice that
    backward (gradients of input and of weight): 6 per parameter and token, less where parameters
    are frozen. In each layer the
    products q·k and p·v of a document of length n take 2 n² heads head_dim operations each
    forward and twice that backward: 12 n² heads head_dim. Rematerialisation, norms, rotary
    embedding and softmax are not counted. For one document of length T as a row this is the
    familiar 6 N + 12 L H T per token, H = heads · head_dim (Chowdhery et al. 2022, appendix B).
    A token meets each number of a recurrent layer's state in three products forward: with its key,
    with what is added under it, and with its query.

    Args:
      parameters_without_embedding: Without the input embedding, which is a look-up, but with the
        output head, tied or not.
      learning: What learns; all by default.
      layers: Layers with attention.
      heads: Query heads; grouped keys do not lower the count.
      head_dim: Size of a head of keys and of values, the mean of both and of these layers.
      tokens: Tokens of the batch without padding.
      squared_lengths: Sum of the squared lengths of the documents, packed or not.
      states: Numbers of the states of recurrent layers.
      untrained_tokens: Those of them whose target has no weight: they do not meet the head.
      forward_passes: Passes without gradients beside the one that learns, such as a reference's.
    """
    count = parameters_without_embedding
    learning = learning or Learning(count, count, True)
    forward = (1 + forward_passes) * count
    weights = 2.0 * (forward + learning.trained + learning.passed) * tokens
    weights -= 2.0 * (learning.head_products + forward_passes) * learning.head * untrained_tokens
    passes = (12.0 if learning.attends_back else 4.0) + 4.0 * forward_passes
    attention = passes * layers * heads * head_dim * squared_lengths
    linear = weights + 1.5 * passes * states * tokens
    return TrainingFlops(linear + attention / 2, linear + attention)

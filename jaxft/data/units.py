"""Units that an objective takes: a document, a pair of answers, or an answer with a label.

A unit of preferences is two documents, one behind the other: the chosen and the rejected answer to
a prompt; or a labelled answer and, for an estimate of the KL divergence, an answer to another
prompt behind the same prompt.
"""

from jaxft.config import DataConfig
from jaxft.errors import ConfigError
from jaxft.formatting import counted

UNITS = ("documents", "pairs", "labelled")
DOCUMENTS_IN = {"documents": 1, "pairs": 2, "labelled": 2}
"""Number of documents in one unit of each kind."""
NOUNS = {"documents": "document", "pairs": "pair", "labelled": "labelled answer"}
CHOSEN, REJECTED, MISMATCHED = 1, -1, 0
"""Labels of documents: of preferred answers, of the others, and of answers to other prompts."""
SIDES = {"pairs": ("chosen", "rejected"), "labelled": ("desirable", "undesirable")}
"""What answers of label 1 and of label -1 are called."""
_CANNOT = {
    "split": "each of its pieces would be compared by itself",
    "stream": "documents of a stream see one another and are cut anywhere",
}


def units_of(name: str, units: str) -> str:
    """Returns what a data set of a run holds: retention measures plain documents in every run.

    Args:
      name: The data set, such as 'train', 'validation' or 'retention'.
      units: What the objective takes.
    """
    return "documents" if name == "retention" else units


def counted_units(count: int, units: str) -> str:
    """Returns a count with its noun, such as '1,100 pairs'."""
    return counted(count, NOUNS[units])


def check_units(units: str, config: DataConfig) -> None:
    """Checks that units can be laid out as the configuration asks.

    Raises:
      ConfigError: For what would tear units apart or train more than answers.
    """
    assert units in UNITS, units
    if units == "documents":
        return
    what = NOUNS[units] + "s"
    problems = []
    if config.packing == "stream":
        problems.append(
            f"data.packing is 'stream', but {what} stay whole: {_CANNOT['stream']}. Set "
            "--config.data.packing=documents."
        )
    if config.overlength == "split":
        problems.append(
            f"data.overlength is 'split', but {what} stay whole: {_CANNOT['split']}. Set "
            "--config.data.overlength=cut_prompt_start, truncate or drop."
        )
    if config.train_on == "all":
        problems.append(
            f"data.train_on is 'all', but of {what} the last answers alone are compared. Set "
            "--config.data.train_on=completion."
        )
    if problems:
        raise ConfigError(problems)

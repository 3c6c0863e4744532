"""The way from files and hub data sets to batches of packed token rows."""

from jaxft.data.batch import Batch
from jaxft.data.chat import prompt_ids
from jaxft.data.formats import Conversation
from jaxft.data.loader import BatchIterator, batches, eval_batches, is_over, sample_numbers
from jaxft.data.preparation import cache_folder, conversations, prepare, skipped_rows
from jaxft.data.rows import Statistics, TokenRows
from jaxft.data.template import Template, resolve_template
from jaxft.data.trained_text import count_bytes

__all__ = [
    "Batch",
    "BatchIterator",
    "Conversation",
    "Statistics",
    "Template",
    "TokenRows",
    "batches",
    "cache_folder",
    "conversations",
    "count_bytes",
    "eval_batches",
    "is_over",
    "prepare",
    "prompt_ids",
    "resolve_template",
    "sample_numbers",
    "skipped_rows",
]

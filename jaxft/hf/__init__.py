"""Hugging Face's side: folders, the Hub, tensors, tokenizers; knows no model, only named arrays."""

import logging

# transformers advises to install PyTorch, which jaxft does without. It says so when it is imported,
# so that the filter is here, before any module of this package imports it.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)
# Of a model that it has no class for, such as Kimi-K2, it doubts what no tokenizer depends on.
logging.getLogger("transformers.configuration_utils").addFilter(
    lambda record: not record.getMessage().startswith("You are using a model of type")
)

"""`jaxft serve`: OpenAI's calls for fine-tuning, and for trying what was tuned.

The server never imports jax: accelerators belong to the processes that it starts.
"""

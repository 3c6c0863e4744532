"""The embedded demo: a base model of our own, made from generated text, and a task for it."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
"""Hugging Face folder of the base model, made by `python -m jaxft.demo.make_base`."""

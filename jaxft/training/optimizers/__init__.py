"""Optimizers: the parts that optax has not, or not by the axes of our weights."""

"""A run's folder: its files, checkpoints, figures and lock."""

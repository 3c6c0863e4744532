"""The work of the commands: train, evaluate, export, generate, check."""

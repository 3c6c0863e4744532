"""What the commands do: train, evaluate, export, generate, check."""

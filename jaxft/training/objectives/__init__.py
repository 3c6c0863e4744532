"""Loss functions: each maps a model and a batch to sums, never means."""

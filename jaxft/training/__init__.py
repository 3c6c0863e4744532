"""What a step computes: objectives, the optimizer, the compiled steps and their state."""

"""The work of a step: objectives, the optimizer, the compiled steps and their state."""

"""Facts of a compiled program: layouts, collectives, instructions."""

"""What a compiled program says of itself: layouts, collectives, instructions."""

"""Chips and devices: their rates, memory and links."""

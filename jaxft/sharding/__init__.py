"""Meshes, axis names and strategies: where arrays live."""

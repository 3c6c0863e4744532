"""Presentation of a run's figures: intervals, charts and the page."""

"""What a run's figures look like: intervals, charts and the page."""

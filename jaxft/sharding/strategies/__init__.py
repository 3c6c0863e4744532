"""One file for each strategy; each defines `STRATEGY`."""

"""Reference numbers of other people's implementations, stored so that tests need no torch."""

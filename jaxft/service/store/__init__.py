"""The memory of the service: a database, and the contents of files."""

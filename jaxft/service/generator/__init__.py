"""The process that generates text for the service, behind a unix socket.

It alone has the accelerator; `client.py`, by which the server reaches it, imports no jax.
"""

"""Accepting: sockets in, chunks into the buffer."""

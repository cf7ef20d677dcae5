"""Memories: they move bytes and keep time; they know slots and bytes, never tokens."""

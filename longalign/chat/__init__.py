"""Talking to a model: one answer for a pipe, or a session in the terminal."""

"""Align language models on long context: tokenize -> group -> train -> eval -> chat."""

__version__ = "0.1.0"

"""Conversations of others, in their own formats: hubs, local files, ShareGPT."""

"""How fast a model trains on this machine, and how much memory it takes."""

"""How long a run will take, how much memory, and what it will cost, before it runs."""

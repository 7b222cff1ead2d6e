"""Processes of a run on one host (workers.py) and on several (hosts.py, agent.py), and jobs of Slurm (slurm.py)."""

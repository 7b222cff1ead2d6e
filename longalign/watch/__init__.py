"""`longalign watch`: what runs are doing. state.py reads their folders, page.py shows that, run.py repeats it."""

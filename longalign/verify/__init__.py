"""Is it right on this machine, with this model and this data?"""

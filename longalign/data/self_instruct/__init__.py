"""source=self_instruct: long instruction data that a model makes from the user's own documents."""

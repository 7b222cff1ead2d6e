"""How good a model is: questions, its answers, scores, pictures."""

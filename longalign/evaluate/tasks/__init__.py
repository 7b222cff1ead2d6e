"""One module per task; see longalign/evaluate/question.py for what each holds."""

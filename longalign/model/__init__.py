"""Plain transformers models: loading, packed attention, weighted loss, cost."""

"""The worker loop on the DeepSpeed engine, its checkpoints, metrics and export."""

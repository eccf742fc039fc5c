"""Training: stages, optimizers, the DeepSpeed engine, the guard, metrics and the loop."""

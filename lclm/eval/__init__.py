"""What a model makes of its latents: probes during and after training, and the report of a run."""

"""Publishing: exports of runs. Knows the model and the run folder, nothing of training."""

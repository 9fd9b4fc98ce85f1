"""Training: the loop, its losses and stages, uptraining and pre-training."""

"""Closed-form refit of a student's weights, layer by layer, on its own inputs."""

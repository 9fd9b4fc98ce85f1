"""Repair: a closed-form refit of a student's weights, layer by layer, on its own inputs."""

from kvfold.contracts.effort import RepairSettings

__all__ = ["RepairSettings"]

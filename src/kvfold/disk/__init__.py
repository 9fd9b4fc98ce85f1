"""Checkpoints, records and outputs on disk: whole or absent, locked, hashed."""

"""Inspection of a checkpoint before it is folded: what its heads are for, which are alike, and how many it needs."""

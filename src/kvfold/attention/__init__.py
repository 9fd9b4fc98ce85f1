"""What a student computes: attention kernels in plain torch, each beside its textbook reference."""

"""Quality and speed of a model: loss, distance to the teacher, recall, tasks, a gate, benchmarks."""

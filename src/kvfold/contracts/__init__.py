"""What methods, families and runtimes agree on: words and data types, without tensors."""

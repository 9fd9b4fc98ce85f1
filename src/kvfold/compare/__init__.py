"""What else would do: a model and its students beside other ways to make it cheaper, in one table."""

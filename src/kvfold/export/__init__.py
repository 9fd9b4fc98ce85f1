"""Other engines' formats: an engine loads its export, which is compared with transformers before it is put in place."""

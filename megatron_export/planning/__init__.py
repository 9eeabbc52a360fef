"""Which tensors, formats, files and ranks an export has, from names and shapes alone."""

"""Reading a dataset: rows, a memory-mapped copy of its pictures, size buckets and corrections."""

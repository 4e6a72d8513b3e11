"""New adapters out of trained ones."""

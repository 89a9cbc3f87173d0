"""What `python -m cubin` does."""

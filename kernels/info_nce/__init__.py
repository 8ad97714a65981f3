"""Losses over nested dims: the public functions (loss.py, soft_targets.py), their autograd function, and backends."""

"""Microbenchmarks of pumice beside its peers: ``python -m bench --help``."""

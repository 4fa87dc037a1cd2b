"""Pumice: kernels that make language models smaller and faster, and the methods that feed them."""

from pumice import ops

__version__ = "0.1.0"

__all__ = ["__version__", "ops"]

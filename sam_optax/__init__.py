"""Sharpness-Aware Minimization for JAX."""

__version__ = "0.1.0"

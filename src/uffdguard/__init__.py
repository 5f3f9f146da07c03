"""Access control for userfaultfd(2) on unmodified Linux kernels."""

__version__ = "0.1.0"

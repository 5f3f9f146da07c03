"""Access control for userfaultfd(2) on unmodified Linux kernels."""

"""Everything that touches the kernel, and nothing that decides policy."""

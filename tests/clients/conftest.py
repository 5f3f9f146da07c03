"""The fixtures of the tests inside the lab."""

from inside import in_force, lab, nothing_in_force

__all__ = ["in_force", "lab", "nothing_in_force"]

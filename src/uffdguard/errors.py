"""The one exception that a user is meant to see."""


class Failure(Exception):
    """Something could not be done: what and why, and what to do about it, on one line.

    The command line prints ``uffdguard: WHAT; HINT`` and exits with 1.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}; {hint}" if hint else what)
        self.what = what
        self.hint = hint

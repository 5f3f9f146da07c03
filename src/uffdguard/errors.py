"""The one exception that a user is meant to see, on one line."""


class Failure(Exception):
    """Something could not be done: what and why, and what to do about it, on one line.

    The command line prints ``uffdguard: WHAT; HINT`` and exits with 1.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        self.what, self.hint = one_line(what), one_line(hint)
        super().__init__(f"{self.what}; {self.hint}" if hint else self.what)


def one_line(text: str) -> str:
    """Return TEXT with escapes for what does not print: it may quote a key, a word or a name that others chose."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

#!/usr/bin/python3 -I
import sys

sys.path.insert(0, "/usr/lib/uffdguard")

from uffdguard.__main__ import main  # noqa: E402

main()

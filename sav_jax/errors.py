"""The one exception that means "your input, not our bug"."""

from __future__ import annotations


class UserError(Exception):
    """Bad input from the user.

    ``str(error)`` is one line that names the file, row and field at fault and, where there is one, the way out. The
    command line prints it as ``error: ...`` on stderr and exits with status 2; library callers may catch it.
    """

"""Mistakes of the user, as opposed to faults of the program."""


class UserError(Exception):
    """Something the user can mend: the command prints the message alone and exits with code 2.

    The message says what was given, what is allowed, and which setting to change.
    """

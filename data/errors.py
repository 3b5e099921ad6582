"""Errors that are a user's to fix."""


class UserError(Exception):
    """An error that its message explains to the user, without a traceback."""


class DataError(UserError):
    """A fault in the data or in a text, described in one sentence."""

"""Errors that a user can act on: the command line prints their message alone, without a traceback."""


class UserError(Exception):
    """Something the user can mend. The message says what was expected, what was found and which setting to change."""


class ModelError(UserError):
    """A model source, its configuration or its weights cannot be used."""


class RequestError(UserError):
    """One request is not acceptable; the engine and all other requests go on."""


class CapacityError(UserError):
    """The device or the host has not enough memory for what was asked."""


class ProcessLostError(UserError):
    """A process of another host has ended: nothing can be computed any more."""

"""Errors that a user can act on: the command line prints their message alone, without a traceback."""


class UserError(Exception):
    """An error that the user can mend. The message says what was expected, what was found and which setting to change."""


class ModelError(UserError):
    """A model source, its configuration or its weights that cannot be used."""


class RequestError(UserError):
    """A request that is not acceptable; the engine and all other requests go on."""


class CapacityError(UserError):
    """A device or a host that has not enough memory for what was asked."""


class ProcessLostError(UserError):
    """The end of a process on another host: nothing can be computed any more."""

"""Every refusal of fspace: what was wrong, where, and what to do about it."""

from typing import Any

from sklearn.exceptions import NotFittedError as _SklearnNotFittedError


class FspaceError(Exception):
    """Base of all errors that fspace raises on purpose."""


class DataError(FspaceError, ValueError):
    """The data cannot be used as given (the message names the row, column or shape)."""


class OptionError(FspaceError, ValueError):
    """An option has a value that does not exist or does not fit the others."""


class UtilityError(FspaceError, ValueError):
    """A utility, loss or cost gave something that cannot be averaged (NaN, infinite, another shape)."""


class InfeasibleError(FspaceError, ValueError):
    """No candidate fulfils the constraints, or none is left."""


class NumericalError(FspaceError, ArithmeticError):
    """A factorisation failed after all permitted repairs."""


class DeviceError(FspaceError, RuntimeError):
    """The device asked for is not there."""


class ModelFileError(FspaceError, ValueError):
    """A file is not a model that fspace saved, or it is damaged."""


class NotFittedError(FspaceError, _SklearnNotFittedError):
    """A prediction was asked of a model that has not been fitted."""


class ServerError(FspaceError, RuntimeError):
    """The posterior server, its store or the way to it is not in order."""


class LearningStopped(ServerError):
    """Learning of a basis came to an end before it was done. `learned` is what there is, to go on from."""

    def __init__(self, message: str, learned: Any):
        super().__init__(message)
        self.learned = learned


class SiteRefused(FspaceError, ValueError):
    """A site that the posterior server does not take; nothing has changed there. `reason` is one word for programs."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # so that it can cross processes
        return type(self), (self.reason, str(self))


class AccessRefused(ServerError):
    """A request that its token does not allow; nothing has changed. `reason` is one word for programs."""

    def __init__(self, reason: str, message: str, status: int = 401, retry_after: float | None = None):
        super().__init__(message)
        self.reason, self.status, self.retry_after = reason, status, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self), self.status, self.retry_after)


class DivergedWarning(UserWarning):
    """A fit stopped being finite; the last finite state is kept, and the fitted object says where it was."""

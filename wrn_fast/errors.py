"""The package's one exception and one warning."""


class WrnFastError(ValueError):
    """Bad input. Reads "`argument`: expected ..., got ...", raised before any kernel runs."""


class FallbackWarning(UserWarning):
    """An operator runs on the plain `aten` backend although a faster one exists for its device. Said once a reason."""

"""The few errors that bitwright raises: one line that says what was expected, what was found, what to do."""


class BitwrightError(Exception):
    """The job failed. The command line ends with exit code 1."""

    exit_code = 1


class UsageError(BitwrightError):
    """The call was wrong (an argument, a file, a setting). The command line ends with exit code 2."""

    exit_code = 2


class DataError(UsageError):
    """Images or labels that cannot be used."""


class ModelError(UsageError):
    """A model that cannot be found, built, loaded or captured."""


class ParityError(BitwrightError):
    """An exported file that does not compute what the simulation computes."""

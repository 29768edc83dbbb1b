"""The errors of data preparation: each message is one sentence that names the thing and the mend."""


class DataError(RuntimeError):
    """Something about tasks, examples or base models that the user can mend."""


class UnknownTaskError(DataError):
    """A task name that is not in the catalogue."""


class DownloadError(DataError):
    """A file that could not be had: no network, no disk space, or a wrong hash."""

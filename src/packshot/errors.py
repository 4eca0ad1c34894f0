"""The one error type for everything a user can put right."""


class PackshotError(Exception):
    """Something went wrong that the user can understand and mend. Scripts print it and exit with ``exit_code``.

    message: one sentence that names the file, sample or key.
    hint: the way out.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.args[0]}\n  {self.hint}" if self.hint else str(self.args[0])


def first_line(error: BaseException) -> str:
    """The first line of a library's error, at most 300 characters; its type if it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


class ConfigError(PackshotError):
    """A key, a value or a path on the command line or in a config file is wrong (exit code 2)."""

    exit_code = 2


class Interrupted(PackshotError):
    """A signal ended a run that can be resumed (exit code 143, as of a process that SIGTERM ended)."""

    exit_code = 143

"""The ways a run can go wrong on purpose. The CLI turns them into one line and an exit code."""

INTERRUPTED = 130  # exit code after Ctrl-C, SIGTERM or SIGHUP
READER_GONE = 141  # exit code where the reader of stdout has closed it, as of a program that SIGPIPE ends


class BdcliError(Exception):
    """`problem` says what is wrong, `hint` the next step to take."""

    exit_code = 1

    def __init__(self, problem: str, hint: str = ""):
        self.problem, self.hint = problem, hint
        super().__init__(problem, hint)

    def __str__(self) -> str:
        return f"{self.problem}. {self.hint}" if self.hint else self.problem


class UserError(BdcliError):
    """Bad input: nothing was computed and nothing is lost."""

    exit_code = 2


class OutputError(BdcliError):
    """stdout cannot be written any more. Nothing is said about it where its reader has simply gone."""

    def __init__(self, reason: str, reader_gone: bool):
        super().__init__(f"stdout cannot be written ({reason})", "Give it another place")
        self.quiet = reader_gone
        if reader_gone:
            self.exit_code = READER_GONE


class NonFiniteError(BdcliError):
    """A model produced NaN or infinite logits. It is never turned into a token."""


class NotStoredError(BdcliError):
    """The store failed when a run ended. `result` has not been shown yet, and is all there is of the run."""

    def __init__(self, error: BdcliError, result: dict):
        super().__init__(f"the result is not stored: {error.problem}", error.hint)
        self.result = result

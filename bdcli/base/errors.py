"""The ways a run can go wrong on purpose. The CLI turns them into one line and an exit code."""

INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM


class BdcliError(Exception):
    """`problem` says what is wrong, `hint` the next step to take."""

    exit_code = 1

    def __init__(self, problem: str, hint: str = ""):
        self.problem, self.hint = problem, hint
        super().__init__(f"{problem}. {hint}" if hint else problem)


class UserError(BdcliError):
    """Bad input: nothing was computed and nothing is lost."""

    exit_code = 2


class NonFiniteError(BdcliError):
    """A model produced NaN or infinite logits. It is never turned into a token."""

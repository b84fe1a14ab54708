"""Exceptions that mean: not the program is at fault, but the input, a machine, or nobody."""

#: Exit codes of commands, the last two as sysexits.h has them (EX_UNAVAILABLE, EX_TEMPFAIL).
USER_ERROR_EXIT = 2
NODE_ERROR_EXIT = 69
STOPPED_EXIT = 75


class UserError(ValueError):
    """Input that the program refuses.

    Its text says what was given, what is allowed and the remedy. Commands print it without a
    traceback and end with exit code 2; library callers can catch it as the ValueError it is.
    """


class ConfigError(UserError):
    """A run configuration or cluster description that cannot be used."""


class CorpusError(UserError):
    """A corpus, tokenizer or document that cannot be used."""


class PlanError(UserError):
    """A batch that cannot be planned, or a plan that does not fit where it is used."""


class CheckpointError(UserError):
    """A checkpoint that is damaged or does not fit the run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is no longer what was written: truncated, altered, or partly gone."""


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite: the data, the learning rate or the precision."""


class NodeError(RuntimeError):
    """A machine at fault: a rank that never came, no longer answers, or a node unfit to train.

    Its text names them. Commands print it without a traceback and end with exit code 69.
    """


class Stopped(Exception):  # noqa: N818
    """A run that ended early because it was asked to; its checkpoint is written.

    Commands end with exit code 75: start the same command again with --resume.
    """

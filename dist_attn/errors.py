"""The one exception that means: the input is at fault, not the program."""


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

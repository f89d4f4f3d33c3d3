"""Every error a user can cause, one class per exit code of the command line.

    Exception
    +-- SpecStreamError            1  base class; never raised itself
        +-- UsageError             2  arguments that contradict each other or the file system
        +-- InvalidInputError      3  a file or value that is wrong: damaged, mismatched, incomplete
        +-- UnsupportedError       4  recognised, well formed, and not something we can do exactly
        +-- VerificationError      5  our own result failed its check; nothing was written

A message says what is wrong, where (``file:tensor``), why, and what to do. Problems of one kind are collected
and raised once, one per line.
"""


class SpecStreamError(Exception):
    """Base of all errors that are reported as one message and an exit code."""

    exit_code = 1


class UsageError(SpecStreamError):
    """Arguments contradict each other, or an output cannot be placed where it was asked for."""

    exit_code = 2


class InvalidInputError(SpecStreamError):
    """A file, tensor, prompt or value is wrong in itself or does not fit the others."""

    exit_code = 3


class UnsupportedError(SpecStreamError):
    """The input is recognised, and no exact result is defined for it here."""

    exit_code = 4


class VerificationError(SpecStreamError):
    """A result was produced and then found to differ from its reference."""

    exit_code = 5

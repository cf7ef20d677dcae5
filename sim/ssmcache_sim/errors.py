"""Errors that are the user's to mend, as opposed to bugs of ours."""


class UserError(ValueError):
    """Something given from outside is wrong. The message is one line: what, where, expected, got."""


class TraceError(UserError):
    """A trace file, or what was asked of a trace, is wrong."""


class TraceWarning(UserWarning):
    """A trace was read, and something of it was guessed. The message is one line."""


class SizeError(UserError):
    """A size or a range of values is written wrongly."""


class SettingsError(UserError):
    """A combination of settings that no cache can have."""


class MemoryTooSmallError(UserError):
    """The memory given cannot serve a single request of the trace."""


class TierFailedError(UserError):
    """A real tier, such as a disk, cannot be read or written."""


class OutputError(UserError):
    """A result directory cannot be written or read."""


class ProfileError(UserError):
    """The profile of a machine is missing, broken or of another format."""


class WorkersError(UserError):
    """The processes or machines that should do the work cannot be had, or are lost."""

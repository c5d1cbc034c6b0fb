"""Define every error that fusewire raises on purpose.

Each message names what is wrong and what to do. docs/errors.md lists the classes.
"""


class FusewireError(RuntimeError):
    """Base class of fusewire's errors."""


class ConfigError(FusewireError, ValueError):
    """An option, a provider's name or an environment variable cannot be used."""


class SchemaError(FusewireError, TypeError):
    """An operator or a provider is registered with a signature or an answer that does not fit."""


class ArgumentError(FusewireError, ValueError):
    """An operator is called with tensors or numbers that it does not take."""


class NoProviderError(FusewireError):
    """No provider of an operator can run a call; the message lists every provider's reason."""


class ProcessGroupError(FusewireError):
    """A process group is missing or unknown, or has no store that its ranks can use."""


class CaptureError(FusewireError):
    """A call cannot run while a CUDA graph is captured: it has to allocate or let ranks vote."""


class WorkspaceError(FusewireError):
    """Memory or kernels that the ranks share cannot be made, are too small, or are closed."""


class PeerTimeoutError(FusewireError):
    """A rank does not arrive within the time limit, or the group's store is gone.

    The message names operation and rank.
    """


class RankMismatchError(FusewireError):
    """The ranks of a process group are about to run collectives that do not fit together."""


class ExpectationError(FusewireError):
    """A compilation fuses another number of all-reduces than `PassConfig.expect_fused` asks for."""


class TrainingError(FusewireError):
    """An operator that has no backward is called on tensors that require gradients."""

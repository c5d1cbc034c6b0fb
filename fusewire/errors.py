"""Every error that fusewire raises on purpose. Each message names what is wrong and what to do."""


class FusewireError(RuntimeError):
    """Base class of all errors raised by fusewire."""


class ConfigError(FusewireError, ValueError):
    """An option is unknown or has a value that cannot be used."""


class SchemaError(FusewireError, TypeError):
    """A provider or an operator was registered with a signature that does not fit."""


class ArgumentError(FusewireError, ValueError):
    """An operator was called with tensors or numbers that it cannot take."""


class NoProviderError(FusewireError):
    """No provider of an operator can serve a call; the message lists every provider's reason."""


class ProcessGroupError(FusewireError):
    """A process group is missing, unknown, or cannot be used."""


class CaptureError(FusewireError):
    """Something that allocates was asked for while a CUDA graph is being captured."""


class WorkspaceError(FusewireError):
    """A symmetric workspace could not be made, or was used after it was closed."""


class PeerTimeoutError(FusewireError):
    """A rank did not take part in a collective in time."""


class RankMismatchError(FusewireError):
    """The ranks of a process group are about to run graphs whose collectives do not fit together."""


class ExpectationError(FusewireError):
    """Compilation fused another number of all-reduces than `PassConfig.expect_fused` asks for."""


class TrainingError(FusewireError):
    """An operator made for inference was differentiated."""

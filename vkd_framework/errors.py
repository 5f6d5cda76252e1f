"""What a user can do wrong, and what can go wrong for them: every message is one line that says where and what next."""


class VKDError(Exception):
    """Base of all errors whose message is meant for the user; `exit_status` is what the command line returns."""

    exit_status = 1


class RecipeError(VKDError):
    """The recipe, or an override of it, is not valid."""

    exit_status = 2


class DataError(VKDError):
    """The data named by the recipe cannot be used."""

    exit_status = 2


class AdapterError(VKDError):
    """An adapter is missing, broken, or gave an answer that the core cannot use."""

    exit_status = 2


class HookError(AdapterError):
    """A hook crashed, or gave an answer that the core cannot use; what a hook refuses by itself is none of these."""


class ModelError(VKDError):
    """A model cannot be loaded, or is not what its adapter expects."""

    exit_status = 2


class ProofError(VKDError):
    """A proof of the run failed: something changed that must not change."""


class LostProcessError(VKDError):
    """Another process of the same run has ended, so that this one cannot go on."""


class DivergedError(VKDError):
    """Training ran away: a loss or a gradient is no finite number."""


def on_one_line(error: BaseException) -> str:
    """The error's message with every run of blanks and line breaks as one blank."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def with_its_kind(error: BaseException) -> str:
    """`KeyError: 'x'`, or the type alone where the error says nothing."""
    return f"{type(error).__name__}: {on_one_line(error)}".removesuffix(": ")

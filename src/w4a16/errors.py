"""The exceptions of w4a16. Each message says what was got, what was wanted and what to do next."""


class W4A16Error(Exception):
    """Base of every exception that w4a16 raises on purpose."""


class Unsupported(W4A16Error):
    """No kernel, layout or format of w4a16 serves this request; the message lists each refusal."""


class BadInput(W4A16Error, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class BadCheckpoint(W4A16Error):
    """A checkpoint is damaged, incomplete or says something w4a16 cannot read; names the file and the tensor."""


class OverBudget(W4A16Error):
    """Memory does not suffice for what was asked; the message has the numbers."""


class KernelFailed(W4A16Error):
    """A kernel did not compile, or its compiler could not write; names the kernel and what to do."""


class NoGolden(W4A16Error):
    """There are no golden numbers to compare with, or they contradict each other."""


def explain_mismatch(what: str, *, got: object, wanted: object, then: str) -> str:
    """One message in the house form: what, got, wanted, next."""
    return f"{what}: got {got}, wanted {wanted}. {then}"

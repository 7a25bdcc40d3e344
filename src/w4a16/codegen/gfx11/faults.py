"""What the emulator raises."""

from ...errors import W4A16Error


class UnknownInstruction(W4A16Error):
    """The machine code has an instruction, operand or modifier that the emulator does not know."""


class Fault(W4A16Error):
    """The machine code did something that hardware would not do, or not do twice alike."""

"""How far an operation is from what the hardware allows."""

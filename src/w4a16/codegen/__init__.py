"""Code generation for devices that are not here: compile, read the machine code, gate it."""

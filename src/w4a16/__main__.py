"""`python -m w4a16`: the `w4a16` command."""

from .cli import main

if __name__ == "__main__":
    main()

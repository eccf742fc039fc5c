"""`python -m lclm` is the `lclm` command."""

from lclm.cli import main

if __name__ == "__main__":
    main()

"""`python -m lclm` is the `lclm` command."""

from lclm.train.ends import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()

    from lclm.cli import main

    main()

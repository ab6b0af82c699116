"""The command as `python -m trimtab.cli`."""

from trimtab.cli import main

if __name__ == "__main__":
    main()

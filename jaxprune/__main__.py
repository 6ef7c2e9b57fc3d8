"""The command line as `python -m jaxprune`."""

from jaxprune.cli import main

if __name__ == "__main__":
    main()

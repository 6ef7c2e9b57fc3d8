"""One command of the command line, one file: a frozen dataclass that is its flags, and the function that runs it."""

"""One of several processes that run commands together: `python together.py HOST:PORT I/N COMMANDS`, a JSON list of lists."""

import json
import sys

from jaxprune import cli


def main(where: str, which: str, commands: str) -> None:
    """Runs them one after the other and prints how each ended."""
    statuses = []
    for words in json.loads(commands):
        try:
            cli.main([*words, "--distributed", f"{where},{which}"])
        except SystemExit as stopped:
            statuses.append(stopped.code)
    print(f"statuses {statuses}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

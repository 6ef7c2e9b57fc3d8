"""One of several processes that run commands together: `python together.py HOST:PORT I/N COMMANDS`, a JSON list of lists."""

import json
import sys

from jaxprune import cli

where, which, commands = sys.argv[1:]
statuses = []
for words in json.loads(commands):
    try:
        cli.main([*words, "--distributed", f"{where},{which}"])
    except SystemExit as stopped:
        statuses.append(stopped.code)
print(f"statuses {statuses}", flush=True)

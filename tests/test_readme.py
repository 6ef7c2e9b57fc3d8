"""What the README shows runs, one block after the other."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert "LayerDims" in capsys.readouterr().out
    assert namespace["small_cfg"].decoder_parameters < 0.75 * namespace["cfg"].decoder_parameters


def test_every_command_of_the_readme_exists():
    from jaxprune import cli

    shown = set(re.findall(r"^jaxprune (\w+)", README.read_text(), flags=re.MULTILINE))
    assert shown == {name for name, _ in cli.COMMANDS.values()}

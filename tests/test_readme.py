"""What the README and docs/integration.md show runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
INTEGRATION = README.parent / "docs" / "integration.md"


def blocks(page: Path) -> dict[str, list[str]]:
    """The Python code of a page, by the heading that it stands under."""
    found: dict[str, list[str]] = {}
    for heading, code in re.findall(r"^## (.*?)$|```python\n(.*?)```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        if heading:
            found[heading] = []
        else:
            found[next(reversed(found))].append(code)
    return {heading: codes for heading, codes in found.items() if codes}


def run(code: str, page: Path, namespace: dict) -> None:
    exec(compile(code, str(page), "exec"), namespace)


def test_the_code_of_the_readme_runs_one_block_after_the_other(capsys):
    codes = [code for codes in blocks(README).values() for code in codes]
    assert len(codes) >= 3
    namespace: dict = {}
    for code in codes:
        run(code, README, namespace)
    assert "LayerDims" in capsys.readouterr().out
    assert namespace["small_cfg"].decoder_parameters < 0.75 * namespace["cfg"].decoder_parameters


def test_every_command_of_the_readme_exists():
    from jaxprune import cli

    shown = set(re.findall(r"^jaxprune (\w+)", README.read_text(), flags=re.MULTILINE))
    assert shown == {name for name, _ in cli.COMMANDS.values()}


@pytest.mark.parametrize("heading", blocks(INTEGRATION))
def test_each_block_of_the_integration_page_runs_by_itself(heading):
    (code,) = blocks(INTEGRATION)[heading]
    assert len(code.splitlines()) <= 40
    namespace: dict = {}
    run(code, INTEGRATION, namespace)
    if "scores" in namespace:  # the units that were kept are those of the highest scores, and not by chance all alike
        last, keep = namespace["scores"][-1]["f"], namespace["keep"]
        keep = keep[-1] if isinstance(keep, list) else keep
        assert last[keep].min() > 0 and last[keep].min() >= sorted(last)[-len(keep)]
    elif "losses" in namespace:
        assert namespace["losses"][-1] < namespace["losses"][0]
    else:
        assert set(namespace["small"].cfg.layers) == {namespace["small"].cfg.layers[0]}
        shapes = [
            tree["model"]["layers"]["3"]["mlp"]["down_proj"]["kernel"].shape
            for tree in (namespace["tree"], namespace["smaller_tree"])
        ]
        assert shapes[0] == (48, 32) and shapes[1] == (namespace["small"].cfg.layers[3].ff, 32) != shapes[0]

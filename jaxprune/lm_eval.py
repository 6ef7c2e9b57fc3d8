"""The command `lm_eval` with our models in it: `python -m jaxprune.lm_eval --model jaxprune --model_args pretrained=DIR ...`.

lm_eval 0.4.13 knows only the models of its own list, so the stock command cannot find this one by itself.
"""

import sys

from jaxprune._harness_model import model_class


def main() -> None:
    """Runs lm_eval's command; without lm_eval it exits with status 2 and says in one line what to install."""
    try:
        model_class()
    except ValueError as error:
        print(f"jaxprune: error: {error}", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

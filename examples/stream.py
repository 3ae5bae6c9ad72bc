"""Print text while it is generated, at two budgets of one bundle: python examples/stream.py MODEL OUT."""

import sys
from pathlib import Path

import shadowllm


def main(model_path: str, out: str) -> None:
    if not Path(out).exists():
        shadowllm.export(model_path, out, selector="static")
    with shadowllm.load(out) as model:
        for neurons in (1.0, 0.5):
            model.set_budget(shadowllm.Budget(neurons=neurons))  # no new export is needed
            print(f"{neurons:.0%} of the neurons:")
            for piece in shadowllm.generate(model, "The sea", stream=True, temperature=0.8, top_p=0.9, seed=7):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except shadowllm.UserError as error:  # a mistake of the user; the message has the remedy
        sys.exit(f"error: {error}")

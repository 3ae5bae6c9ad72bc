"""Export a model to a bundle and generate text: python examples/export_and_generate.py MODEL OUT."""

import sys

import shadowllm


def main(model_path: str, out: str) -> None:
    budget = shadowllm.Budget(neurons=0.5, heads=0.75)
    manifest = shadowllm.export(model_path, out, budget=budget, selector="quantized-shadow", overwrite=True)
    print(f"{out}: {manifest.model}, {manifest.predictor['kind']} predictor, {manifest.dtype}")
    with shadowllm.load(out) as model:
        print(shadowllm.generate(model, "The shadow of a model", max_new_tokens=32))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except shadowllm.UserError as error:  # a mistake of the user; the message has the remedy
        sys.exit(f"error: {error}")

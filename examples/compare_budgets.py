"""Compare the quality of several budgets: python examples/compare_budgets.py MODEL OUT."""

import sys
from pathlib import Path

import shadowllm


def main(model_path: str, out: str) -> None:
    if not Path(out).exists():
        shadowllm.export(model_path, out, budget=shadowllm.Budget())  # `evaluate` gets budgets of its own
    results = shadowllm.evaluate(out, neurons=(0.3, 0.5, 0.7), heads=(0.75,))
    print(f"{'selector':<18}{'neurons':>8}{'perplexity':>12}{'as dense':>10}")
    for result in results:
        agreement = f"{result.top1_agreement:.0%}"
        print(f"{result.selector:<18}{result.neuron_budget:>8.0%}{result.perplexity:>12.2f}{agreement:>10}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except shadowllm.UserError as error:  # a mistake of the user; the message has the remedy
        sys.exit(f"error: {error}")

"""Compare the quality of several budgets: python examples/compare_budgets.py MODEL OUT."""

import sys

import shadowllm


def main(model_path: str, out: str) -> None:
    shadowllm.export(model_path, out, selector="quantized-shadow")
    results = shadowllm.evaluate(out, neurons=(0.3, 0.5, 0.7), heads=(0.75,))
    print(f"{'selector':<18}{'neurons':>8}{'perplexity':>12}{'as dense':>10}")
    for result in results:
        agreement = f"{result.top1_agreement:.0%}"
        print(f"{result.selector:<18}{result.neuron_budget:>8.0%}{result.perplexity:>12.2f}{agreement:>10}")


if __name__ == "__main__":
    main(*sys.argv[1:3])

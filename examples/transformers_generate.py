"""A batch with the interface of transformers: python examples/transformers_generate.py MODEL OUT."""

import sys
from pathlib import Path

import shadowllm


def main(model_path: str, out: str) -> None:
    if not Path(out).exists():
        shadowllm.export(model_path, out, selector="static")
    with shadowllm.ShadowForCausalLM.from_pretrained(out) as model:
        tokenizer = model.tokenizer
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
        inputs = tokenizer(["The sea", "A shadow of"], padding=True, return_tensors="pt", return_token_type_ids=False)
        for neurons in (1.0, 0.5):
            budget = shadowllm.Budget(neurons=neurons)
            tokens = model.generate(**inputs, max_new_tokens=16, repetition_penalty=1.2, budget=budget)
            for text in tokenizer.batch_decode(tokens, skip_special_tokens=True):
                print(f"{neurons:.0%} of the neurons: {text}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except shadowllm.UserError as error:  # a mistake of the user; the message has the remedy
        sys.exit(f"error: {error}")

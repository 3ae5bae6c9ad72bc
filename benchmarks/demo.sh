#!/bin/sh
# The main workflow, end to end, on SmolLM2-135M. The output of the steps is the result.
set -eu
: "${OUT:=out}"
MODEL=$(python "$(dirname "$0")/model_path.py")
mkdir -p "$OUT"

START=$(date +%s)
say() { printf '\n== %s (after %d s)\n' "$*" "$(($(date +%s) - START))"; }

say "export: calibrate, write graphs, choose a budget within +5% perplexity, check everything against PyTorch"
shadowllm export "$MODEL" "$OUT/bundle" --overwrite
say "build: TensorRT-RTX engines with the plugins in them"
shadowllm build "$OUT/bundle" --engine tensorrt_rtx
say "run: the same prompt, sparse and dense"
shadowllm run "$OUT/bundle" --prompt "The shadow of a large language model is" --against ort-dense --max-new-tokens 48
say "bench: sparse against ONNX Runtime dense"
shadowllm bench "$OUT/bundle" --against ort-dense --iterations 3 --json "$OUT/report.json" --plot "$OUT/report.png"
say "the dial: two more budgets, and ONNX Runtime dense in float32, int8 and int4"
python -m shadowllm.benchmarks.frontier "$MODEL" "$OUT/frontier" --bundle "$OUT/bundle" --runs 3 --windows 1 \
  --integers int8 int4 --short --json "$OUT/frontier.json"
say "done"

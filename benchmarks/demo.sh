#!/bin/sh
# The main workflow, end to end, on SmolLM2-135M. The output of the steps is the result.
set -eu
: "${OUT:=out}"
NEURONS=0.5
HEADS=0.75
MODEL=$(python "$(dirname "$0")/model_path.py")
mkdir -p "$OUT"

say() { printf '\n== %s\n' "$*"; }

say "calibrate: trace which heads and neurons matter"
shadowllm calibrate "$MODEL" -o "$OUT/traces.safetensors"
say "train: a small network that predicts them"
shadowllm train "$MODEL" --traces "$OUT/traces.safetensors" -o "$OUT/predictor.safetensors" --neuron-budget $NEURONS --head-budget $HEADS
say "export: ONNX graphs, checked against PyTorch"
shadowllm export "$MODEL" "$OUT/bundle" --predictor "$OUT/predictor.safetensors" --neuron-budget $NEURONS --head-budget $HEADS --overwrite
say "build: TensorRT-RTX engines with the plugins in them"
shadowllm build "$OUT/bundle" --engine tensorrt_rtx
say "run: the same prompt, sparse and dense"
shadowllm run "$OUT/bundle" --prompt "The shadow of a large language model is" --against ort-dense --max-new-tokens 48
say "bench: sparse against ONNX Runtime dense"
shadowllm bench "$OUT/bundle" --against ort-dense --json "$OUT/report.json" --plot "$OUT/report.png"
say "the same with a 4-bit copy of the weights as the predictor, which needs no training"
shadowllm export "$MODEL" "$OUT/quantized" --selector quantized-shadow --neuron-budget $NEURONS --head-budget $HEADS --overwrite
shadowllm bench "$OUT/quantized" --against ort-dense --json "$OUT/quantized.json"

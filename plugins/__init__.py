"""The custom ops: schemas, references, ONNX function bodies and native implementations."""

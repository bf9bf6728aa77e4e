"""ONNX: segments, composition into the one file with If nodes, parity."""

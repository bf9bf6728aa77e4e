"""What runs on the device: numpy and onnxruntime only, no other room."""

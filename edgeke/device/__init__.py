"""What runs on the device: needs numpy and onnxruntime, and no other package of ours."""

import os

# ONNX Runtime 1.31 would keep a device id in the user's folder and look up a telemetry host.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

"""What runs on the device: needs numpy and onnxruntime, and no other package of ours."""

import os
import sys
import warnings

from edgeke.device.needs import check

check()
# ONNX Runtime 1.31 would keep a device id in the user's folder and look up a telemetry host. It
# reads this while it is imported.
if not os.environ.get("ORT_DISABLE_TELEMETRY"):
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    if "onnxruntime" in sys.modules:
        warnings.warn(
            "onnxruntime was imported before edgeke.device, and its newer versions then keep a "
            "device id in your home folder and look up a telemetry host; set "
            "ORT_DISABLE_TELEMETRY=1, or import edgeke.device first",
            stacklevel=2,
        )

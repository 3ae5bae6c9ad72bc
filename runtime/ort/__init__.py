"""The session that uses ONNX Runtime.

Raises:
    UserError: on import, if ONNX Runtime is not installed, or installed twice.
"""

from shadowllm.runtime.ort_package import check_package

check_package()

import onnxruntime  # noqa: E402

onnxruntime.disable_telemetry_events()  # nothing that a user does is reported

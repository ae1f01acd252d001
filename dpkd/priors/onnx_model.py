"""Runs an ONNX model by onnxruntime, on the CPU or on a GPU."""

import numpy as np
import onnxruntime

from dpkd.errors import UserError
from dpkd.priors.model_output import Array, Run, chosen
from dpkd.priors.model_settings import OnnxModel

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def load_onnx(model: OnnxModel, *, device: str) -> Run:
    """The model as a function of images BCHW; on the CPU it takes one thread.

    Raises `UserError` where onnxruntime has no provider for the device, or the model has no single image input or not
    the output; and what onnxruntime raises for a file that is no model.
    """
    provider, available = PROVIDERS[device], onnxruntime.get_available_providers()
    if provider not in available:
        raise UserError(
            f"this onnxruntime runs on {', '.join(available)} alone: install onnxruntime-gpu in its place, or set "
            "device=cpu for this prior"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the pool has a process for every core
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.file, options, providers=[provider])
    if provider not in session.get_providers():  # onnxruntime would go on without
        raise UserError(f"onnxruntime could not start its {provider}; see its message above, or set device=cpu")
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in FLOATS:
        given = ", ".join(f"{each.name} {each.type}" for each in inputs)
        raise UserError(f"it takes {given}, and a prior gives one float image batch: export it with that input alone")
    name = chosen({each.name: each.name for each in session.get_outputs()}, model.output)
    dtype = FLOATS[inputs[0].type]

    def run(image_BCHW: Array) -> Array:
        (output,) = session.run([name], {inputs[0].name: image_BCHW.astype(dtype, copy=False)})
        return np.asarray(output, np.float32)

    return run

"""The model as MLflow serves it; it runs this file ("models from code"), no object is stored.

It is stored beside the artifact `onnx` and a copy of the device package: neither torch nor DVC is
needed. MLflow drops parameters that it does not know with a warning, and fields of a request
without one; an answer without the requirement that was misspelt would be silently wrong, so both
are refused here.
"""

import importlib
import inspect
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from edgeke.device.classifier import Classifier
from edgeke.errors import InputError

_FIELDS = ("inputs", "instances", "params")
_REQUIREMENTS = tuple(inspect.signature(Classifier.predict).parameters)[2:]


class Served(PythonModel):
    """Images in, answers out, within the requirements given as parameters of the request."""

    def load_context(self, context: Any) -> None:
        """Open the one-file model."""
        self.classifier = Classifier(context.artifacts["onnx"])
        _refuse_unknown()

    # `model_input` has no type: MLflow would read one as a promise of another kind of signature.
    def predict(self, context, model_input, params=None) -> pd.DataFrame:  # type: ignore[no-untyped-def]
        """One row per image of `[N, H, W, C]`, 0 to 255: label, class_name, confidence, exit.

        Colours are RGB. `params` are the requirements that `Classifier.predict` takes, null where
        there is none.
        Errors: MlflowException (400) for requirements that cannot be met, and for wrong images.
        """
        requirements = {key: value for key, value in (params or {}).items() if value is not None}
        try:
            if not isinstance(model_input, np.ndarray | list):
                raise InputError("images must be a list [N, H, W, C] under `inputs`")
            images = np.asarray(model_input)
            whole = np.issubdtype(images.dtype, np.integer) and images.size
            if whole and images.min() >= 0 and images.max() <= 255:
                images = images.astype(np.uint8)  # JSON's numbers; the classifier refuses others
            answers = [self.classifier.predict(image, **requirements) for image in images]
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame(
            {
                "label": [answer.label for answer in answers],
                "class_name": [answer.class_name for answer in answers],
                "confidence": [float(answer.probabilities.max()) for answer in answers],
                "exit": [answer.exit for answer in answers],
            }
        )


def _refuse_unknown() -> None:
    """Wrap the function of MLflow's server that drops what it does not know."""
    server: Any = importlib.import_module("mlflow.pyfunc.scoring_server")
    split = server._split_data_and_params

    def split_request(text: Any) -> Any:
        request = server._decode_json_input(text)
        _check("field", request, _FIELDS)
        if isinstance(request.get("params"), dict):
            _check("parameter", request["params"], _REQUIREMENTS)
        return split(text)

    server._split_data_and_params = split_request


def _check(kind: str, names: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = ", ".join(sorted(set(names) - set(known)))
    if unknown:
        raise MlflowException.invalid_parameter_value(
            f"unknown {kind} {unknown}; use {', '.join(known)}"
        )


set_model(Served())

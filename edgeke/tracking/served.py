"""The model as MLflow serves it; it runs this file ("models from code"), no object is stored.

It stands beside the artifact `onnx` and a copy of the device room, and needs neither torch nor DVC.
"""

from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from edgeke.device.classifier import Classifier
from edgeke.errors import InputError

__all__ = ["Served"]


class Served(PythonModel):
    """Images in, answers out, within the requirements given as parameters of the request."""

    def load_context(self, context: Any) -> None:
        """Open the one-file model."""
        self.classifier = Classifier(context.artifacts["onnx"])

    # `model_input` has no type: MLflow would read one as a promise of another kind of signature.
    def predict(self, context, model_input, params=None) -> pd.DataFrame:  # type: ignore[no-untyped-def]
        """One row per image of uint8 `[N, H, W, C]`: label, class, confidence and exit.

        `params` are the requirements that `Classifier.predict` takes, null where nothing is asked.
        Errors: MlflowException (400) for requirements that cannot be met, and for wrong images.
        """
        asked = {key: value for key, value in (params or {}).items() if value is not None}
        try:
            answers = [self.classifier.predict(image, **asked) for image in np.asarray(model_input)]
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


set_model(Served())

"""The model as MLflow serves it; MLflow runs this file itself ("models from code"), no pickle.

It stands beside the artifact `onnx` and a copy of the device room, and needs neither torch nor DVC.
"""

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from numpy.typing import NDArray

from edgeke.device.classifier import Classifier

__all__ = ["Served"]


class Served(PythonModel):
    """Images in, answers out, within the requirements given as parameters of the request."""

    def load_context(self, context: Any) -> None:
        """Open the one-file model."""
        self.classifier = Classifier(context.artifacts["onnx"])

    def predict(
        self, context: Any, model_input: NDArray[np.uint8], params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row per image of uint8 `[N, H, W, C]`: label, class, confidence and exit.

        `params` are the requirements that `Classifier.predict` takes; one of NaN is not asked for.
        """
        asked = {key: value for key, value in (params or {}).items() if not np.isnan(value)}
        answers = [self.classifier.predict(image, **asked) for image in np.asarray(model_input)]
        return pd.DataFrame(
            {
                "label": [answer.label for answer in answers],
                "class_name": [answer.class_name for answer in answers],
                "confidence": [float(answer.probabilities.max()) for answer in answers],
                "exit": [answer.exit for answer in answers],
            }
        )


set_model(Served())

"""The page at `/`: its files, and what its script needs to know of a model."""

import math
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from edgeke.device.classifier import Classifier
from edgeke.device.policy import OperatingPoint, Policy

FILES = Path(__file__).with_name("static")
RUNTIME = FILES / "ort" / "ort.wasm.min.mjs"  # `make web` fetches it
MOST_SAMPLES = 12
# Nothing from elsewhere, nothing inline; WebAssembly for ONNX Runtime. The last two give the
# page's clock its full resolution.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
        "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
}


class _Files(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(HEADERS)
        return response


def routes() -> list[Route | Mount]:
    """The page's own files: without a token, since it is the page that asks for one."""

    async def index(_: Any) -> Response:
        return FileResponse(FILES / "index.html", headers=HEADERS)

    return [Route("/", index), Mount("/page", _Files(directory=FILES))]


def list_samples(bundle: Path) -> list[Path]:
    """The first twelve pictures of a bundle's `samples/`; links are left out."""
    files = sorted((bundle / "samples").glob("*.png"))
    return [file for file in files if file.is_file() and not file.is_symlink()][:MOST_SAMPLES]


def describe(classifier: Classifier, samples: list[Path]) -> dict[str, Any]:
    """What the page needs to show a model, and to choose its points in the browser.

    Of each point: `promised`, the degradation promised at the policy's delta for each cap.
    """
    policy = classifier.policy
    return {
        "classes": list(classifier.classes),
        "image_shape": list(classifier.image_shape),
        "fit": classifier.fit,
        "exits": len(policy.macs),
        "delta": policy.delta,
        "default": policy.default,
        "caps": list(policy.caps),
        "points": [_point(policy, point) for point in policy.points],
        "samples": [file.name for file in samples],
        "browser": RUNTIME.is_file(),
    }


def _point(policy: Policy, point: OperatingPoint) -> dict[str, Any]:
    promised = {cap: point.promised("max_degradation", policy.delta, cap) for cap in policy.caps}
    return {
        "name": point.name,
        "thresholds": list(point.thresholds),
        "votes": list(point.votes),
        "bias": list(point.bias),
        "unsure": point.unsure,
        "deepest": point.deepest,
        "shares": list(point.shares),
        "accuracy": point.validation_accuracy,
        "promised": {str(cap): value for cap, value in promised.items() if math.isfinite(value)},
    }

"""Serve a bundle: python -m edgeke.serving models. docs/serving.md has protocol and options."""

import argparse
import logging
import os
import sys
from pathlib import Path

from edgeke.errors import InputError, report


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal ends it. 0 after a signal, 1 for bad input."""
    parser = argparse.ArgumentParser(prog="edgeke.serving", description=__doc__)
    parser.add_argument("bundle", type=Path, help="a bundle folder, with segments/ in it")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from elsewhere")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--precision", choices=("int8", "fp32"), help="default: int8 where present")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument("--batch", type=int, default=32, help="most images in one batch")
    parser.add_argument(
        "--longest", type=float, default=1.0, metavar="SECONDS",
        help="that an answer may take; the deadline, where all requests have the same",
    )  # fmt: skip
    parser.add_argument("--body-limit", type=int, default=32, metavar="MIB")
    parser.add_argument("--tls-certificate", type=Path)
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--token-file", type=Path, help="clients must send what is in it")
    parser.add_argument(
        "--shift-state", type=Path, metavar="FILE",
        help="keeps over restarts whether images still come as in calibration",
    )  # fmt: skip
    parser.add_argument(
        "--keep-unsure", type=Path, metavar="FOLDER",
        help="for images that no exit was sure of, and those after an alarm of shift",
    )  # fmt: skip
    parser.add_argument("--keep-limit", default="500MB", help="of that folder: oldest go first")
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error")
    )
    options = parser.parse_args(arguments)
    try:
        return _serve(options)
    except InputError as error:
        return report(error)


def read_token(file: Path | None) -> str | None:
    """The token in a file; None without a file. Errors: InputError when there is none in it."""
    if file is None:
        return None
    if not os.access(file, os.R_OK):
        raise InputError(f"{file} cannot be read")
    token = file.read_text().strip()
    if not token:
        raise InputError(f"{file} is empty; write a token into it")
    return token


def _serve(options: argparse.Namespace) -> int:
    try:
        import uvicorn

        from edgeke.serving.application import JsonLines, Server, Settings
        from edgeke.serving.front import UVICORN
        from edgeke.serving.keep import parse_size
    except ImportError as error:
        raise InputError(
            f"{error.name} is missing: pip install -r requirements-serving.txt"
        ) from None
    if not 1 <= options.batch <= 1024 or not 1 <= options.body_limit <= 4096:
        raise InputError("--batch must be 1 to 1024, --body-limit 1 to 4096 MiB")
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise InputError("give both --tls-certificate and --tls-key, or neither")
    for file in (options.tls_certificate, options.tls_key):
        if file is not None and not os.access(file, os.R_OK):
            raise InputError(f"{file} cannot be read")
    token = read_token(options.token_file)
    settings = Settings(
        options.bundle, options.precision, options.threads, token,
        options.body_limit * 2**20, batch=options.batch, longest=options.longest,
        shift_state=options.shift_state, keep_unsure=options.keep_unsure,
        keep_limit=parse_size(options.keep_limit),
    )  # fmt: skip
    server = Server(settings)
    with server.check() as classifier:
        server.watch(classifier)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler], force=True)
    uvicorn.run(
        server.application,
        host=options.host,
        port=options.port,
        **UVICORN,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
        timeout_keep_alive=30,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

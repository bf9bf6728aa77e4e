"""An error names its cause, and data outside of the model is not read."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toys import ROOT

from edgeke.device.onnx_file import _FIELDS
from edgeke.device.session import open_session
from edgeke.errors import InputError


def model(opset: int = 18, kind: str = "Add") -> onnx.ModelProto:
    """x + weight, inside the branch of an If."""
    weight = numpy_helper.from_array(np.ones(2, np.float32), "weight")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    branches = {
        f"{name}_branch": helper.make_graph([helper.make_node(kind, ["x", "weight"], ["y"])],
                                            name, [], [y], [weight])
        for name in ("then", "else")
    }  # fmt: skip
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("sure", TensorProto.BOOL, []),
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [2])
    node = helper.make_node("If", ["sure"], ["out"], **branches)
    graph = helper.make_graph([node], "graph", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def of_version_99() -> bytes:
    newer = model()
    newer.ir_version = 99
    return newer.SerializeToString()


WHOLE = model().SerializeToString()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; copy it again"),
        (WHOLE[:-1], f"is truncated: it ends after {len(WHOLE) - 1} bytes"),
        (WHOLE[: len(WHOLE) // 2], "is truncated"),
        (b"no model at all, but words", "is not an ONNX model, or damaged"),
        (WHOLE[:20] + bytes([255] * 40) + WHOLE[60:], "is (not an ONNX model|truncated)"),
        (b"PK\3\4 and more", "is a zip archive; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"\x1c\0\0\0TFL3", "is a TensorFlow Lite model"),
        (b"\x1c\0\0\0ORTM", "is a model in ONNX Runtime's own format"),
        (
            of_version_99(),
            r"is of a newer format than ONNX Runtime \d.* reads; install a newer one",
        ),
        (model(opset=99).SerializeToString(), "is of a newer format than ONNX Runtime"),
        (model(kind="New").SerializeToString(), "has an operator that ONNX Runtime .* lacks"),
    ],
)
def test_the_cause_is_named(tmp_path, capfd, content, words):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError, match=rf"m\.onnx ({words})") as caught:
        open_session(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_file_that_cannot_be_opened_says_why(tmp_path):
    open_session(WHOLE)
    (tmp_path / "m.onnx").write_bytes(WHOLE)
    for name, words in (
        ("", "is a folder"),
        ("none.onnx", "is missing"),
        ("m.onnx/a", "directory"),
    ):
        with pytest.raises(InputError, match=words):
            open_session(tmp_path / name)


def test_a_file_or_folder_that_may_not_be_read(bundle, tmp_path):
    """By a user who is not its owner, in a process of that user's."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from edgeke.device.classifier import Classifier\n"
        "from edgeke.errors import InputError\n"
        "os.getuid() or os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try: Classifier(path)\n"
        "    except InputError as error: print(error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    closed = tmp_path / "closed"
    bundle.rename(closed)
    (tmp_path / "one.onnx").write_bytes(WHOLE)
    (tmp_path / "one.onnx").chmod(0o000)
    closed.chmod(0o000)
    done = subprocess.run(
        [sys.executable, "-c", code, closed, closed / "edgeke.onnx", tmp_path / "one.onnx"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    closed.chmod(0o755)
    assert done.stdout.count("may not be read by this user (permission denied)") == 3, done


def test_data_outside_of_the_model_is_not_read(tmp_path, monkeypatch):
    """Wherever a tensor may be: ONNX Runtime before 1.24 reads any file that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(8))
    whole = model()
    branch = whole.graph.node[0].attribute[0].g
    constant = helper.make_node(
        "Constant", [], ["c"], value=numpy_helper.from_array(np.ones(2, np.float32))
    )
    branch.node.append(constant)
    for tensor in (branch.initializer[0], branch.node[1].attribute[0].t):
        kept = tensor.raw_data
        for name in ("secret", str(tmp_path / "secret"), "../secret"):
            tensor.raw_data = kept
            onnx.external_data_helper.set_external_data(tensor, name)
            tensor.ClearField("raw_data")
            (tmp_path / "m.onnx").write_bytes(whole.SerializeToString())
            for form in (tmp_path / "m.onnx", whole.SerializeToString()):
                with pytest.raises(InputError, match="keeps data in a file outside of it"):
                    open_session(form)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = kept
    branch.doc_string = "a word such as location is allowed"
    assert open_session(whole.SerializeToString())


def test_every_way_to_a_tensor_is_followed():
    """The numbers are those of ONNX's own description."""
    messages = {
        "model": "ModelProto", "training": "TrainingInfoProto", "function": "FunctionProto",
        "graph": "GraphProto", "node": "NodeProto", "attribute": "AttributeProto",
        "sparse": "SparseTensorProto", "tensor": "TensorProto",
    }  # fmt: skip
    for name, fields in _FIELDS.items():
        described = getattr(onnx, messages[name], None) or onnx.onnx_ml_pb2.__dict__[messages[name]]
        expected = {
            field.number: kind
            for field in described.DESCRIPTOR.fields
            for kind, message in messages.items()
            if field.message_type is not None and field.message_type.name == message
        }
        assert fields == expected, name

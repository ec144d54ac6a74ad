"""Small ONNX models, written as the protobuf messages that they are (onnx.proto of ONNX 1.x)."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FLOAT, INT64 = 1, 7


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def node(kind: str, inputs: Sequence[str], output: str, **ints: Sequence[int]) -> bytes:
    """A NodeProto whose attributes are lists of integers."""
    attributes = b"".join(
        _field(5, _field(1, name) + b"".join(_field(8, item) for item in items) + _field(20, 7))
        for name, items in ints.items()
    )
    names = b"".join(_field(1, name) for name in inputs)
    return names + _field(2, output) + _field(3, output) + _field(4, kind) + attributes


def tensor(name: str, array: NDArray[np.float32] | NDArray[np.int64]) -> bytes:
    """A TensorProto."""
    kind = FLOAT if array.dtype == np.float32 else INT64
    dims = b"".join(_field(1, size) for size in array.shape)
    return dims + _field(2, kind) + _field(8, name) + _field(9, array.tobytes())


def _value(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    kind = _field(1, _field(1, FLOAT) + _field(2, dims))
    return _field(1, name) + _field(2, kind)


def write_model(
    path: Path,
    *,
    nodes: Sequence[bytes],
    weights: Sequence[bytes] = (),
    inputs: dict[str, Sequence[int]],
    outputs: dict[str, Sequence[int]],
) -> Path:
    graph = b"".join(_field(1, item) for item in nodes) + _field(2, "graph")
    graph += b"".join(_field(5, item) for item in weights)
    graph += b"".join(_field(11, _value(name, shape)) for name, shape in inputs.items())
    graph += b"".join(_field(12, _value(name, shape)) for name, shape in outputs.items())
    opset = _field(8, _field(1, "") + _field(2, 13))
    path.write_bytes(_field(1, 8) + opset + _field(7, graph))
    return path


def write_embedder(path: Path, *, side: int = 112) -> Path:
    """A model that takes a face for its pixels, averaged to 14 x 14: [1, 3, S, S] -> [1, 588]."""
    patch = [side // 14] * 2
    return write_model(
        path,
        nodes=[
            node("AveragePool", ["data"], "small", kernel_shape=patch, strides=patch),
            node("Flatten", ["small"], "vector"),
        ],
        inputs={"data": (1, 3, side, side)},
        outputs={"vector": (1, 588)},
    )


POINTS = ((0.3, 0.4), (0.7, 0.4), (0.5, 0.55), (0.35, 0.75), (0.65, 0.75))
"""Eyes, nose, corners of the mouth that :func:`write_yunet` says, within a face."""


def write_yunet(path: Path, *, side: int = 256) -> Path:
    """A model with YuNet's outputs that takes pure red cells of 32 x 32 pixels for faces, and
    doubles their size."""
    nodes: list[bytes] = []
    weights: list[bytes] = []
    outputs: dict[str, Sequence[int]] = {}
    for stride in (8, 16, 32):
        red_13SS = np.zeros((1, 3, stride, stride), dtype=np.float32)
        if stride == 32:
            # Pixels come as blue, green, red in 0 to 255.
            red_13SS[0, :] = np.array([-1, -1, 1], dtype=np.float32)[:, None, None]
            red_13SS /= 255 * stride * stride
        heads = {
            "cls": (red_13SS, [0.0]),
            "obj": (red_13SS, [0.0]),
            "bbox": (np.zeros((4, *red_13SS.shape[1:])), [0.5, 0.5, math.log(2), math.log(2)]),
            "kps": (np.zeros((10, *red_13SS.shape[1:])), [x for place in POINTS for x in place]),
        }
        for head, (weight, bias) in heads.items():
            name, size = f"{head}_{stride}", len(bias)
            weights += [
                tensor(f"w_{name}", np.asarray(weight, dtype=np.float32)),
                tensor(f"b_{name}", np.array(bias, dtype=np.float32)),
                tensor(f"s_{name}", np.array([1, -1, size], dtype=np.int64)),
            ]
            names = ["input", f"w_{name}", f"b_{name}"]
            pair = [stride, stride]
            nodes += [
                node("Conv", names, f"c_{name}", kernel_shape=pair, strides=pair),
                node("Transpose", [f"c_{name}"], f"t_{name}", perm=[0, 2, 3, 1]),
                node("Reshape", [f"t_{name}", f"s_{name}"], name),
            ]
            outputs[name] = (1, (side // stride) ** 2, size)
    return write_model(
        path, nodes=nodes, weights=weights, inputs={"input": (1, 3, side, side)}, outputs=outputs
    )

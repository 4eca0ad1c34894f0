"""Small ONNX networks, written without the library that writes them."""

import struct


def proto(*fields):
    """Protobuf wire format of (number, value) pairs; value: int, text, or an encoded message."""

    def varint(value):
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    encoded = b""
    for number, value in fields:
        if isinstance(value, int):
            encoded += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            encoded += varint(number << 3 | 2) + varint(len(data)) + data
    return encoded


def tensor(name, *shape):
    # a dimension is a number or, where it is free, a name
    dims = proto(*((1, proto((2 if isinstance(size, str) else 1, size))) for size in shape))
    return proto((1, name), (2, proto((1, proto((1, 1), (2, dims))))))


def dark_is_product(path, side, channels=3):
    """ONNX model: output = -2 * mean of the channels, so black (-0.5 in IS-Net's scale) is 1 and grey is 0."""
    axes = proto((1, "axes"), (8, 1), (20, 7))
    graph = proto(
        (1, proto((1, "input"), (2, "mean"), (4, "ReduceMean"), (5, axes))),
        (1, proto((1, "mean"), (2, "negative"), (4, "Neg"))),
        (1, proto((1, "negative"), (1, "negative"), (2, "output"), (4, "Add"))),
        (2, "dark"),
        (11, tensor("input", 1, channels, side, side)),
        (12, tensor("output", 1, 1, side, side)),
    )
    path.write_bytes(proto((1, 8), (7, graph), (8, proto((1, ""), (2, 13)))))
    return str(path)


def twice_as_large(path, factor=2):
    """ONNX model: a picture of any size, each of its pixels ``factor`` times across and down."""
    scales = struct.pack("<4f", 1, 1, factor, factor)
    initializer = proto((1, 4), (2, 1), (8, "scales"), (9, scales))
    attributes = []
    for name, value in (
        ("mode", "nearest"),
        ("coordinate_transformation_mode", "asymmetric"),
        ("nearest_mode", "floor"),
    ):
        attributes.append((5, proto((1, name), (4, value), (20, 3))))
    node = proto((1, "input"), (1, ""), (1, "scales"), (2, "output"), (4, "Resize"), *attributes)
    graph = proto(
        (1, node),
        (2, "larger"),
        (5, initializer),
        (11, tensor("input", 1, 3, "height", "width")),
        (12, tensor("output", 1, 3, "high", "wide")),
    )
    path.write_bytes(proto((1, 8), (7, graph), (8, proto((1, ""), (2, 13)))))
    return str(path)


def values(name, kind, data, *shape):
    """A constant of a graph. kind: 1 for float32, 7 for int64."""
    return proto(*((1, size) for size in shape), (2, kind), (8, name), (9, data))


def numbers(name, *given):
    """An attribute of whole numbers."""
    return proto((1, name), *((8, number) for number in given), (20, 7))


def number(name, given):
    """An attribute of one whole number."""
    return proto((1, name), (3, given), (20, 2))


def colour_detector(path, names, side=64):
    """ONNX model in the format of YOLO detectors: one box, three classes as sure as the mean of red, green and blue."""
    graph = proto(
        (
            1,
            proto(
                (1, "images"), (2, "means"), (4, "ReduceMean"), (5, numbers("axes", 2, 3)), (5, number("keepdims", 0))
            ),
        ),
        (1, proto((1, "means"), (1, "last"), (2, "classes"), (4, "Unsqueeze"))),
        (1, proto((1, "box"), (1, "classes"), (2, "output0"), (4, "Concat"), (5, number("axis", 1)))),
        (2, "detector"),
        (5, values("last", 7, struct.pack("<q", 2), 1)),
        (5, values("box", 1, struct.pack("<4f", 9, 9, 9, 9), 1, 4, 1)),
        (11, tensor("images", 1, 3, side, side)),
        (12, tensor("output0", 1, 4 + 3, 1)),
    )
    described = [
        (14, proto((1, "names"), (2, repr(dict(enumerate(names)))))),
        (14, proto((1, "license"), (2, "GPL-9"))),
    ]
    path.write_bytes(proto((1, 8), (7, graph), (8, proto((1, ""), (2, 13))), *described))
    return str(path)


def coarse_colours(path, side=64, tokens=False):
    """ONNX model of a picture: its mean colours in 4x4 cells, as one vector or as the first of three tokens."""
    cell = side // 4
    pooled = "first" if tokens else "output"
    nodes = [
        (1, proto((1, "input"), (2, "cells"), (4, "AveragePool"), (5, numbers("kernel_shape", cell, cell)),
                  (5, numbers("strides", cell, cell)))),
        (1, proto((1, "cells"), (2, pooled), (4, "Flatten"))),
    ]  # fmt: skip
    shape = (1, 48)
    if tokens:
        nodes += [
            (1, proto((1, "first"), (1, "middle"), (2, "row"), (4, "Unsqueeze"))),
            (1, proto((1, "row"), (2, "other"), (4, "Neg"))),
            (1, proto((1, "row"), (1, "other"), (1, "other"), (2, "output"), (4, "Concat"), (5, number("axis", 1)))),
            (5, values("middle", 7, struct.pack("<q", 1), 1)),
        ]
        shape = (1, 3, 48)
    ends = (11, tensor("input", 1, 3, side, side)), (12, tensor("output", *shape))
    path.write_bytes(proto((1, 8), (7, proto(*nodes, (2, "colours"), *ends)), (8, proto((1, ""), (2, 13)))))
    return str(path)

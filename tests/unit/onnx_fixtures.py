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

"""Execution providers of ONNX networks."""

from packshot.imaging.onnx import providers


def test_cuda_comes_before_the_cpu_and_tensorrt_is_left_out():
    """TensorRT compiles each network for minutes at its first picture."""
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    assert providers(available) == ["CUDAExecutionProvider", "CPUExecutionProvider"]

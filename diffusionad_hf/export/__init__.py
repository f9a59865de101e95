"""Models as one graph for OpenVINO or ONNX Runtime."""

"""What the tests of both formats share."""

import pytest
import torch

needs_onnx_export = pytest.mark.skipif(torch.__version__ < (2, 10), reason="ONNX files need torch 2.10 or newer")

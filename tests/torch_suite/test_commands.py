"""`jaxnorm convert` writes files that PyTorch reads."""

import numpy as np
import torch
from test_cli_surgery import fakes, here, run

__all__ = ["fakes", "here"]  # fixtures


def test_convert_to_a_file_of_torch(here, fakes, capsys):
    name = f"--model {here.name}:factory --input 2,3"
    run(capsys, f"convert --from linen {name} --to-torch --to w.pt")
    found = torch.load("w.pt", weights_only=True)
    np.testing.assert_array_equal(found["linear.bias"], here.variables["params"]["Dense_0"]["bias"])
    assert found["half.a/b"].dtype == torch.bfloat16

"""The oracle, and what benchmarks measure jaxnorm beside, against PyTorch, which computes apart."""

import numpy as np
import pytest
import torch
from testing.test_oracle import CASES, backward, draw, forward

from jaxnorm.testing import assert_close, oracle


def torch_norm(case_name):
    f = torch.nn.functional
    return {
        "batch": lambda x, w, b: f.batch_norm(
            x.transpose(1, 2), None, None, w, b, training=True, eps=1e-3
        ).transpose(1, 2),
        "layer": lambda x, w, b: f.layer_norm(x, (5,), w, b, eps=1e-6),
        "layer, two axes": lambda x, w, b: f.layer_norm(x, (4, 5), w, b, eps=1e-6),
        "rms": lambda x, w: f.rms_norm(x, (5,), 1.0 + w, eps=1e-6),
        "group, features first": lambda x, w, b: f.group_norm(x, 3, w, b, eps=1e-6),
        "instance": lambda x, w, b: f.instance_norm(
            x.movedim(-1, 1), weight=w, bias=b, eps=1e-6
        ).movedim(1, -1),
    }[case_name]


@pytest.mark.parametrize(
    "case_name", ["batch", "layer", "layer, two axes", "rms", "group, features first", "instance"]
)
def test_forward_and_backward_equal_torch(case_name):
    case = CASES[case_name]
    x, parameters, dy, options = draw(case)
    inputs = [torch.tensor(a, requires_grad=True) for a in (x, *parameters.values())]
    y = torch_norm(case_name)(*inputs)
    theirs = torch.autograd.grad(y, inputs, torch.tensor(dy))
    assert_close(forward(case, x, parameters, options), y.detach().numpy(), np.float64)
    ours = backward(case, dy, x, parameters, options)
    for name, expected in zip(ours, theirs, strict=True):
        assert_close(
            ours[name], expected.numpy(), np.float64, what="derivative", conditioning=2.0, name=name
        )


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_state_equals_torch(training):
    rng = np.random.default_rng(5)
    x, dy = rng.normal(3.0, 2.0, size=(2, 7, 4))
    mean, var = rng.normal(size=4), rng.uniform(0.5, 2.0, size=4)
    module = torch.nn.BatchNorm1d(4, eps=1e-5, momentum=0.1, affine=False, dtype=torch.float64)
    module.running_mean.copy_(torch.tensor(mean))
    module.running_var.copy_(torch.tensor(var))
    module.train(training)
    x_torch = torch.tensor(x, requires_grad=True)
    y_torch = module(x_torch)
    y_torch.backward(torch.tensor(dy))
    options = {"training": training, "decay": 0.9, "unbiased": True}
    y, stats = oracle.batch_norm(x, None, None, mean, var, count=3, **options)
    dx, dscale, dbias = oracle.batch_norm_vjp(dy, x, None, None, mean, var, **options)
    assert_close(y, y_torch.detach().numpy(), np.float64)
    assert_close(stats.mean, module.running_mean.numpy(), np.float64)
    assert_close(stats.var, module.running_var.numpy(), np.float64)
    assert_close(dx, x_torch.grad.numpy(), np.float64, what="derivative", conditioning=2.0)
    assert (stats.count, dscale, dbias) == (3 + training, None, None)

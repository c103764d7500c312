"""Which implementation of the linear-attention operator runs, and that a named one never gives way to another."""

import pytest
import torch
from test_kernel_linear import draw, options

from attnconvert.kernels import choice
from attnconvert.kernels.linear import api
from attnconvert.kernels.linear.reference import linear_attention as reference


def test_auto_on_the_cpu_is_the_reference() -> None:
    x, settings = draw(20), options("block", 8, 2)
    assert torch.equal(api.linear_attention(**x, **settings).output, reference(**x, **settings).output)


def test_triton_by_name_says_why_it_cannot_run_instead_of_falling_back() -> None:
    x = draw(20, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"impl=.triton. cannot run here: .* (GPU|installed)"):
        api.linear_attention(**x, **options("block", 8, 2), impl="triton")
    with pytest.raises(ValueError, match="float64"):
        api.linear_attention(**draw(20), **options("block", 8, 2), impl="triton")


def test_the_environment_variable_replaces_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_AUTO", "triton")
    x, settings = draw(20, dtype=torch.float32), options("block", 8, 2)
    with pytest.raises(ValueError, match="triton"):
        api.linear_attention(**x, **settings)
    api.linear_attention(**x, **settings, impl="reference")
    monkeypatch.setattr(choice, "_AUTO", "cuda")
    with pytest.raises(ValueError, match=r"'cuda', not one of auto, reference, triton .*ATTNCONVERT_IMPL"):
        api.linear_attention(**x, **settings)

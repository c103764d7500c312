"""A model in training whose attention modules were given new projections: each layer keeps the module it came from as its teacher.

One module at a time stands in the model. Teacher and student differ in nothing but the attention modules, so switching them is all it takes to run
either, and a layer can be asked for both outputs of one input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnconvert.surgery.regroup import projection_form
from attnconvert.surgery.sites import Site


@dataclass(frozen=True)
class AttentionCall:
    """What an attention module was called with. Training rows are packed, so every token counts."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def valid(self) -> Tensor:
        """Which tokens are real, bool [B, T]: all of them."""
        states: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


class RegroupedLayer:
    """One layer, as `distill.loop.ConvertedLayer` wants it. Outputs are those of the attention module, after its output projection.

    Attributes:
        student: the attention module with the new projections.
        source: the attention module it came from, frozen; not part of the model while the student stands there.
        needs_calibration: False.
    """

    needs_calibration = False

    def __init__(self, model: nn.Module, site: Site):
        """Remember the module at `site` as it is now. It stays in the model as the student, to be given other projections."""
        path, _, self._name = site.path.rpartition(".")
        self._parent = model.get_submodule(path)
        self.student: Any = model.get_submodule(site.path)
        shared = {id(module.config): module.config for module in self.student.modules() if hasattr(module, "config")}
        self.source: Any = copy.deepcopy(self.student, shared).eval().requires_grad_(False)
        self._teacher = False
        self._tap: Callable[..., None] | None = None
        self._hook: Any = None
        # The parameters stay the same objects when they are filled anew, and when adapters are wrapped around the projections.
        form = projection_form(self.student)
        assert form is not None, "the caller checked the architecture"
        self._parameters = {f"{name}.{part}": p for name in (*form.inputs, form.output) for part, p in getattr(self.student, name).named_parameters()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The student's projections."""
        yield from self._parameters.items()

    @property
    def teacher(self) -> bool:
        """True = the source stands in the model."""
        return self._teacher

    @teacher.setter
    def teacher(self, value: bool) -> None:
        self._teacher = value
        self._place()

    @property
    def tap(self) -> Callable[..., None] | None:
        """None, or a function called as `tap(layer, call, y)` with the source's output y [B, 1, T, E]; then the layer returns it."""
        return self._tap

    @tap.setter
    def tap(self, value: Callable[..., None] | None) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._tap = value
        self._hook = None if value is None else self.source.register_forward_hook(self._tell, with_kwargs=True)
        self._place()

    def _place(self) -> None:
        setattr(self._parent, self._name, self.source if self._teacher or self._tap is not None else self.student)

    def _tell(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert self._tap is not None
        self._tap(self, AttentionCall(args, kwargs), output[0][:, None])

    def __call__(self, call: AttentionCall) -> Tensor:
        """The student's output [B, 1, T, E] for what the source was called with."""
        output: Tensor = self.student(*call.args, **call.kwargs)[0][:, None]
        return output


def remember_sources(model: nn.Module, sites: Sequence[Site]) -> dict[int, RegroupedLayer]:
    """Layer index -> the layer with its present attention module as teacher; costs a copy of the attention weights.

    The projections in the model become fp32, as trained parameters are. Without new ones in their place the student is the teacher, which a baseline
    trained on the same data starts from.

    Args:
        model: a causal LM, not yet changed.
        sites: its attention sites.
    """
    layers = {site.layer_idx: RegroupedLayer(model, site) for site in sites}
    for layer in layers.values():
        for _, parameter in layer.named_parameters():
            parameter.data = parameter.data.float()
    return layers

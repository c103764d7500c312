"""What a recipe may say. Composes the settings of the methods (surgery) and of the stages (distill); importing it imports no torch.

A mistake is raised inside pydantic with its location, so that `recipes/load.py` can point at the line of the YAML file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from attnconvert.distill.config import DataConfig, EvalConfig, StagesConfig
from attnconvert.errors import AttnConvertError
from attnconvert.surgery import registry
from attnconvert.surgery.method import MethodConfig

if TYPE_CHECKING:
    from typing_extensions import LiteralString

SOFTMAX = "softmax"
"""The word in `method:` that keeps a layer as it is."""

_RANGE = re.compile(r"(-?[0-9]+)-(-?[0-9]+)")
_LAYERS_EXPECTED = "a layer number such as 3 or -1 (the last layer), or an inclusive range such as 5-9"


def _problem(code: LiteralString, message: str, expected: str) -> PydanticCustomError:
    """A mistake as pydantic can carry it; the loader makes an AttnConvertError of its `ctx`."""
    return PydanticCustomError(code, "{message}", {"message": message, "expected": expected})


class LayerSpan(NamedTuple):
    """Layers `first` to `last`, both included; negative numbers count from the end."""

    first: int
    last: int


def parse_layers(item: int | str) -> LayerSpan:
    """One entry of a layer list, such as 3, -1, `5-9` or `4--1`.

    Raises:
        PydanticCustomError: the entry is no layer number or range, or the range runs backwards.
    """
    if isinstance(item, int) and not isinstance(item, bool):
        return LayerSpan(item, item)
    match = _RANGE.fullmatch(item.replace(" ", "")) if isinstance(item, str) else None
    if match is None:
        raise _problem("invalid-layers", f"{item!r} names no layer", _LAYERS_EXPECTED)
    span = LayerSpan(int(match[1]), int(match[2]))
    # A range from a positive to a negative number can be checked only against a model.
    if (span.first < 0) == (span.last < 0) and span.first > span.last:
        raise _problem("invalid-layers", f"the range {item!r} runs backwards, so it holds no layer", f"{span.last}-{span.first}, or another range that goes up")
    return span


def _check_layers(item: Any) -> Any:
    parse_layers(item)
    return item


LayerItem = Annotated[int | str, BeforeValidator(_check_layers)]


def resolve_layers(items: Sequence[int | str], num_layers: int, *, where: str) -> list[int]:
    """The layers that a checked list names in a model of `num_layers` layers, ascending, each once.

    Args:
        items: entries such as 3, -1, `5-9`.
        num_layers: layers of the model.
        where: YAML path of the list, for the error.

    Raises:
        AttnConvertError: `layer-out-of-range`, when an entry names a layer the model does not have.
    """
    found: set[int] = set()
    for item in items:
        first, last = (n + num_layers if n < 0 else n for n in parse_layers(item))
        if not 0 <= first <= last < num_layers:
            raise AttnConvertError(
                "layer-out-of-range",
                f"{str(item)!r} does not fit a model of {num_layers} layers",
                where=where,
                expected=f"layers from 0 to {num_layers - 1}, or from -{num_layers} to -1 counted from the end",
            )
        found.update(range(first, last + 1))
    return sorted(found)


def _check_method(value: Any) -> Any:
    if value == SOFTMAX:
        return value
    try:
        registry.get(value if isinstance(value, str) else str(value))
    except AttnConvertError as error:
        if error.code != "unknown-method":
            raise
        # The registry does not know `softmax`, which is a valid word here; the loader adds the close match.
        raise PydanticCustomError(
            "unknown-method",
            "{message}",
            {"message": f"unknown method {value!r}", "choices": [*registry.available(), SOFTMAX], "hint": error.hint},
        ) from None
    return value


def _check_config(value: Any, info: ValidationInfo) -> Any:
    """Validate `config:` by the settings class of the rule's method; its errors keep their YAML path."""
    if "method" not in info.data:  # the method itself is wrong and reported
        return None
    method = info.data["method"]
    if method == SOFTMAX:
        if value:
            raise _problem("invalid-value", "method softmax has no settings", "no `config:` beside `method: softmax`")
        return None
    settings = registry.get(method).config
    return value if isinstance(value, settings) else settings.model_validate({} if value is None else value)


class RecipeModel(BaseModel):
    """Base of the recipe's own blocks: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRule(RecipeModel):
    """Which layers get which attention. Rules are read in order; the first that matches a layer decides."""

    match: Literal["all"] | Annotated[tuple[LayerItem, ...], Field(min_length=1)] = Field(
        description="`all`, or a list of layer numbers (negative = from the end) and inclusive ranges: [0, 5-9, -1]"
    )
    method: Annotated[str, BeforeValidator(_check_method)] = Field(description="a method of `attnconvert methods`, or softmax to keep the layer as it is")
    config: Annotated[SerializeAsAny[MethodConfig] | None, BeforeValidator(_check_config)] = Field(
        default=None, validate_default=True, description="the method's own settings (`attnconvert methods NAME`); a missing key takes its default"
    )

    @field_validator("match", mode="wrap")
    @classmethod
    def _one_error_path(cls, value: Any, handler: Any) -> Any:
        """Say what is wrong with the list itself: pydantic alone would report each arm of the union, under a path that the file does not have."""
        if isinstance(value, list | tuple):
            if not value:
                raise _problem("invalid-layers", "the list names no layer", f"at least one entry: {_LAYERS_EXPECTED}")
            wrong: list[InitErrorDetails] = []
            for index, item in enumerate(value):
                try:
                    parse_layers(item)
                except PydanticCustomError as error:
                    wrong.append(InitErrorDetails(type=error, loc=(index,), input=item))
            if wrong:
                raise ValidationError.from_exception_data("match", wrong)
        elif value != "all":
            raise _problem("invalid-layers", f"{value!r} names no layers", "`all` or a list such as [0, 5-9, -1]")
        return handler(value)


class KeepConfig(RecipeModel):
    """Layers put back to softmax between transfer and finetune, either named or chosen by measurement."""

    layers: Annotated[tuple[LayerItem, ...], Field(min_length=1)] | None = Field(
        default=None, description="these layers: numbers (negative = from the end) and inclusive ranges"
    )
    fraction: float | None = Field(default=None, gt=0, lt=1, description="this share of all layers, rounded down but at least one, chosen by `by`")
    by: Literal["layer_error", "kl"] | None = Field(
        default=None,
        description="layer_error (the default with fraction): the largest relative errors after transfer; "
        "kl: the largest drop of the KL to the teacher when the layer alone is put back, one evaluation per layer",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_measure(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("fraction") is not None and data.get("by") is None:
            return {**data, "by": "layer_error"}
        return data

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> KeepConfig:
        if (self.layers is None) == (self.fraction is None):
            message = "keep needs `layers` or `fraction`" if self.layers is None else "keep has both `layers` and `fraction`"
            raise _problem("invalid-value", message, "exactly one of layers, fraction")
        if self.layers is not None and self.by is not None:
            raise _problem("invalid-value", f"`by: {self.by}` chooses layers by measurement, but `layers` names them", "`by` beside `fraction` only")
        return self

    def num_layers(self, total: int) -> int:
        """How many of `total` layers `fraction` keeps: rounded down, at least one."""
        assert self.fraction is not None, "num_layers is for keep.fraction; keep.layers says which"
        return max(1, math.floor(self.fraction * total + 1e-9))  # 0.29 * 100 is 28.999... in binary


class Recipe(RecipeModel):
    """One conversion, start to end, without the model: any model of the right kind can be given to it."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="name of the recipe, used in reports and the model card: letters, digits, dot, dash, underscore"
    )
    description: str = Field(default="", description="one sentence for `attnconvert recipes list`")
    reference: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")] | None = Field(
        default=None, description="URL of the paper or code the recipe follows"
    )
    layers: Annotated[tuple[LayerRule, ...], Field(min_length=1)] = Field(
        description="which layer gets which attention; a layer that no rule matches keeps softmax"
    )
    keep: KeepConfig | None = Field(default=None, description="layers put back to softmax after attention transfer; null = none")
    data: DataConfig = DataConfig()
    stages: StagesConfig
    evaluate: EvalConfig = EvalConfig()
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of data order, LoRA initialisation and evaluation")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="arithmetic of the training passes; auto = bf16 on a GPU that has it, else fp32; state and normaliser are fp32 always"
    )

    @field_validator("layers", mode="after")
    @classmethod
    def _every_rule_can_match(cls, rules: tuple[LayerRule, ...]) -> tuple[LayerRule, ...]:
        everything = next((i for i, rule in enumerate(rules) if rule.match == "all"), len(rules))
        dead: list[InitErrorDetails] = []
        for index, rule in enumerate(rules[everything + 1 :], everything + 1):
            problem = _problem("invalid-layers", f"this rule is never used: rule {everything} above it matches all layers", "`match: all` as the last rule")
            dead.append(InitErrorDetails(type=problem, loc=(index, "match"), input=rule.match))
        if dead:
            raise ValidationError.from_exception_data("layers", dead)
        return rules

    @model_validator(mode="after")
    def _something_to_keep(self) -> Recipe:
        if self.keep is not None and not self.methods:
            problem = _problem("invalid-value", "keep has nothing to put back: every rule keeps softmax", "`keep` beside a rule with a method")
            raise ValidationError.from_exception_data("keep", [InitErrorDetails(type=problem, loc=("keep",), input=None)])
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods the rules use, sorted; softmax is none. The CLI verbs check these against their family."""
        return tuple(sorted({rule.method for rule in self.layers} - {SOFTMAX}))


def assign_rules(rules: Sequence[LayerRule], num_layers: int) -> list[int | None]:
    """Index of the rule that decides each layer of a model, None where no rule matches (the layer keeps softmax).

    Raises:
        AttnConvertError: `layer-out-of-range` when a rule names a layer the model does not have; `unused-rule` when earlier rules took all its layers.
    """
    decided: list[int | None] = [None] * num_layers
    for index, rule in enumerate(rules):
        where = f"layers.{index}.match"
        wanted = range(num_layers) if rule.match == "all" else resolve_layers(rule.match, num_layers, where=where)
        free = [layer for layer in wanted if decided[layer] is None]
        if not free:
            raise AttnConvertError(
                "unused-rule",
                f"rule {index} decides no layer: earlier rules match all of its layers",
                where=where,
                hint="the first rule that matches a layer decides; move the narrower rule up or delete this one",
            )
        for layer in free:
            decided[layer] = index
    return decided

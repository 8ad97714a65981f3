"""The types that settings are declared with: ranges of numbers, kinds of text, and what a setting is not part of.

What each setting means, and what must fit each other, is in settings.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, WrapValidator

from drama_dist.labels import checked_collection, checked_endpoint, checked_suite, without_url

T = TypeVar("T")
CROP_KINDS = {"span": 4.0, "sentence": 2.0, "joined": 1.0, "keywords": 2.0, "title": 1.0}  # and their weights
SOURCES = ("crop", "synthetic", "rerank", "triplet", "labelled", "logged")  # of training examples
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)  # of every section
COST_ONLY = object()  # marks fields, see `recorded`


def _one_line(text: str) -> str:
    if not text.strip() or _CONTROL.search(text):
        raise ValueError("must be one line of text, not empty")
    return text


def _expand_home(name: str) -> str:
    return os.path.expanduser(name) if name.startswith("~/") else name


def _distinct(values: list[T]) -> list[T]:
    if len(set(values)) < len(values):
        raise ValueError("must differ from each other")
    return values


def _gib_or_auto(value: Any, validate: Callable[[Any], Any]) -> Any:
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("must be auto, or GiB: a number, 0 or more") from None


def _weights_of(names: Collection[str], optional: bool = False) -> Callable[[dict[str, float]], dict[str, float]]:
    def checked(weights: dict[str, float]) -> dict[str, float]:
        if not set(names).issuperset(weights) or not (sum(weights.values()) or (optional and not weights)):
            raise ValueError(f"must be weights of {', '.join(names)}, one of them more than 0")
        return weights

    return checked


FreeText = Annotated[str, Field(max_length=2**16)]  # checks that it is Unicode, too
Text = Annotated[str, Field(max_length=4096), AfterValidator(_one_line)]
Name = Annotated[Text, AfterValidator(_expand_home)]  # of a file, a folder or a model; ~/ is the home folder
Model = Annotated[Name, AfterValidator(checked_endpoint)]  # also an endpoint's, URL#MODEL
CollectionName = Annotated[Name, AfterValidator(checked_collection)]  # also a data set's, see labels.NAMED_FORMS
SuiteName = Annotated[Name, AfterValidator(checked_suite)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=1, le=2**24)]  # layers, components or tokens of a text: no model has as many
Rank = Annotated[int, Field(ge=1, le=2**16)]  # of a passage for a query; no search looks further down
TextTokens = Annotated[int, Field(ge=3, le=2**24)]  # BOS and EOS are two
Amount = Annotated[float, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SomeFraction = Annotated[float, Field(gt=0, le=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]  # Adam moves a weight by about as much in a step
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]  # beyond these float32 cannot tell scores apart
Dtype = Literal["auto", "bfloat16", "float32"]  # auto: bfloat16 where the device is fast in it
Precision = Literal["float32", "int8", "binary"]  # of passages' vectors when they are searched
Distinct = Annotated[list[T], AfterValidator(_distinct)]
SomeKeys = Annotated[Distinct[Text], Field(min_length=1)]
CostOnly = Annotated[T, COST_ONLY]  # see `recorded`
GibOrAuto = Annotated[Amount | Literal["auto"], WrapValidator(_gib_or_auto)]
Weights = dict[Model, Annotated[float, Field(gt=0, lt=2**31)]]
CropKinds = Annotated[dict[str, Amount], AfterValidator(_weights_of(CROP_KINDS))]
SourceWeights = Annotated[dict[str, Amount], AfterValidator(_weights_of(SOURCES, optional=True))]


def recorded(section: Any) -> dict[str, Any]:
    """The settings of a section that its artefact depends on, as plain YAML types.

    Fields marked CostOnly are left out: they change what a stage costs (memory, time, how often it saves) or when it
    gives up (the limits), and nothing of what it writes but the rounding of sums that are taken in another order. So
    a stage that was stopped goes on with other values of them, and a finished one counts as made with any. Of endpoints
    the model alone is recorded, because servers move.
    """
    hints = get_type_hints(type(section), include_extras=True)
    return {
        name: without_urls(value)
        for name, value in dataclasses.asdict(section).items()
        if COST_ONLY not in getattr(hints[name], "__metadata__", ())
    }


def without_urls(value: Any) -> Any:
    """Settings with the models of endpoints in place of their names."""
    if isinstance(value, dict):
        return {without_url(str(key)): without_urls(inner) for key, inner in value.items()}
    return without_url(value) if isinstance(value, str) else value

"""Statistics under a classifier's module names, and under the bare backbone's."""

from __future__ import annotations

import pytest
import torch

from osrm import Gradients, with_prefix_of

NAMES = ["0.query", "0.value", "1.query", "1.value"]


def test_names_get_a_prefix_and_lose_it(random_covariance):
    covariance = random_covariance("a")
    assert list(covariance.modules) == NAMES
    longer = [f"bert.{name}" for name in NAMES]
    # Adapters may sit at a part of what was collected, and elsewhere too.
    (renamed,) = with_prefix_of({"a": covariance}, [*longer[:2], "bert.pooler"]).values()
    assert list(renamed.modules) == longer
    (back,) = with_prefix_of({"a": renamed}, NAMES[1:]).values()
    assert back.modules == covariance.modules
    for name in NAMES:
        assert torch.equal(renamed.matrix(f"bert.{name}"), covariance.matrix(name))


def test_gradients_of_a_classifier_fit_the_bare_backbone():
    moments = {f"bert.{name}": torch.rand(3, 3) for name in NAMES}
    (renamed,) = with_prefix_of({"a": Gradients(moments, 5)}, NAMES).values()
    assert list(renamed.moments) == NAMES
    assert all(renamed.moments[name] is moments[f"bert.{name}"] for name in NAMES)


@pytest.mark.parametrize(
    "modules",
    [
        ["bert.0.query", "model.1.query"],  # two prefixes: which of them?
        ["bert.pooler", "head.dense"],  # none
        ["bert10.query"],  # another layer, whose name ends in the same letters
        ["0.query", "bert.1.query"],  # some names are the covariance's already
    ],
)
def test_what_fits_by_no_one_prefix_is_left_as_it_is(random_covariance, modules):
    (found,) = with_prefix_of({"a": random_covariance("a")}, modules).values()
    assert list(found.modules) == NAMES

from __future__ import annotations

import pytest

from griffin import GriffinConfig
from griffin.backends import _BACKENDS
from griffin.config import BACKENDS
from griffin.methods import METHODS


def test_names_of_config_are_those_that_exist() -> None:
    assert all(callable(method.select_function) for method in METHODS.values() if method.select is not None)
    assert all(callable(method.scores_function) for method in METHODS.values())
    assert set(BACKENDS) == {"auto", *_BACKENDS}


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_density_outside_is_refused_with_what_was_found(density: object) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1") as caught:
        GriffinConfig(density=density)  # type: ignore[arg-type]
    assert repr(density) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("selection", "topp", "did you mean 'topk'"),
        ("batch", "each", "per_sequence"),
        ("backend", "cuda", "reference"),
        ("layers", (), "empty"),
        ("layers", (-1,), "whole numbers"),
        ("layers", "0,1", "list of layer indices"),
        ("seed", -1, "whole number"),
        ("seed", 1.5, "whole number"),
    ],
)
def test_wrong_values_say_what_to_do(field: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GriffinConfig(**{field: value})  # type: ignore[arg-type]


def test_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'density'"):
        GriffinConfig.from_mapping({"densty": 0.5})


@pytest.mark.parametrize(
    ("density", "width", "k"),
    [(0.5, 1536, 768), (0.75, 11008, 8256), (0.29, 100, 29), (0.3, 10, 3), (0.7, 10, 7), (0.999, 10, 9), (1.0, 7, 7)],
)
def test_number_of_experts_is_the_floor(density: float, width: int, k: int) -> None:
    assert GriffinConfig(density=density).experts_of(width) == k


def test_there_is_always_one_expert() -> None:
    assert GriffinConfig(density=0.001).experts_of(80) == 1

import pytest

from stochastic_depth.plain_text import si


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1 k"),
        (1234, "1.23 k"),
        (999_499, "999 k"),
        (999_700_000, "1 G"),
        (2.5e15, "2.5 P"),
    ],
)
def test_a_count_has_three_digits_and_a_prefix(count: float, shown: str) -> None:
    assert si(count) == shown

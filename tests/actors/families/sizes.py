"""Image sizes the laws are tested on."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LAW = settings(
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

EXTREMES = [(1, 1), (1, 50), (50, 1), (2, 3), (80, 4000), (4000, 80), (384, 384), (385, 383), (1080, 1920)]


@st.composite
def sizes(draw: st.DrawFn, longest: int = 4000) -> tuple[int, int]:
    """(height, width) from 1 x 1 on, aspect ratios to 50:1."""
    side = draw(st.integers(1, longest))
    other = draw(st.integers(max(1, side // 50), side))
    return (side, other) if draw(st.booleans()) else (other, side)

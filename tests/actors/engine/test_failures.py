"""Error recovery: a batch that fails is tried apart."""

from hypothesis import given
from hypothesis import strategies as st

from actors.engine.failures import try_apart


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_every_item_that_fails_alone_is_settled_alone_and_the_others_pass(bad: list[bool]) -> None:
    items = list(range(len(bad)))
    passed: list[int] = []
    settled: list[tuple[int, bool]] = []

    def attempt(some) -> None:
        if any(bad[item] for item in some):
            raise ValueError
        passed.extend(some)

    try_apart(
        items, attempt, lambda some, _: len(some) == 1, lambda item, _, made: settled.append((item, made))
    )
    assert settled == [(item, True) for item in items if bad[item]]
    assert passed == [item for item in items if not bad[item]]

"""How the check evaluates label selectors."""

import pytest

from scripts.k8s_check.objects import selects

pytestmark = pytest.mark.k8s


@pytest.mark.parametrize(
    ("operator", "values", "matches"),
    [
        ("In", ["proxy", "x"], True),
        ("In", ["x"], False),
        ("NotIn", ["x"], True),
        ("NotIn", ["proxy"], False),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
    ],
)
def test_selectors_match_as_in_kubernetes(operator: str, values: list[str], *, matches: bool) -> None:
    """All labels and expressions must match. NotIn matches a missing label."""
    expression = {"key": "app", "operator": operator, "values": values}
    selector = {"matchLabels": {"tier": "a"}, "matchExpressions": [expression]}
    assert selects(selector, {"app": "proxy", "tier": "a"}) is matches
    assert not selects(selector, {"app": "proxy", "tier": "b"})
    assert selects({"matchExpressions": [expression]}, {}) is (operator in {"NotIn", "DoesNotExist"})

"""What the check understands of a manifest by itself."""

import pytest

from scripts.k8s_check.objects import selects

pytestmark = pytest.mark.k8s


@pytest.mark.parametrize(
    ("operator", "values", "fits"),
    [
        ("In", ["proxy", "x"], True),
        ("In", ["x"], False),
        ("NotIn", ["x"], True),
        ("NotIn", ["proxy"], False),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
    ],
)
def test_selectors_fit_as_kubernetes_has_them(operator: str, values: list[str], *, fits: bool) -> None:
    """By labels and by expressions, all of which must hold; of a label that is missing, NotIn does."""
    expression = {"key": "app", "operator": operator, "values": values}
    selector = {"matchLabels": {"tier": "a"}, "matchExpressions": [expression]}
    assert selects(selector, {"app": "proxy", "tier": "a"}) is fits
    assert not selects(selector, {"app": "proxy", "tier": "b"})
    assert selects({"matchExpressions": [expression]}, {}) is (operator in {"NotIn", "DoesNotExist"})

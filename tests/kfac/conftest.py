"""What all tests of K-FAC share."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Small networks have factors too small for their strategy; that they say so is tested with the report."""
    item.add_marker(pytest.mark.filterwarnings("ignore:KFAC. some factors are too small"), append=False)

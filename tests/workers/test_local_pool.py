import pytest

from evomerge.workers.local_pool import LocalPool
from tests.contracts.pool import PoolContract
from tests.fakes import make_fake_worker


class TestLocalPool(PoolContract):
    @pytest.fixture(autouse=True)
    def _pool(self) -> None:
        self.pool = LocalPool(make_fake_worker)

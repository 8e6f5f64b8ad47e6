"""The caches of the torch backend."""

from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache
from bdcli.cache.official import OfficialCache
from bdcli.cache.selection import CacheKinds

TORCH_CACHES = CacheKinds(FullCache, OfficialCache, BudgetCache)

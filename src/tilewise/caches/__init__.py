"""KV caches under one protocol: a layout (dense, rolling, paged) of some contents (`KV`, `Latent`, `Int8`).

`attention_decode(q, cache)` reads any of them through `cache.view()`.
"""

from tilewise.caches.base import Cache as Cache
from tilewise.caches.base import Lifecycle as Lifecycle
from tilewise.caches.contents import KV as KV
from tilewise.caches.dense import DenseCache as DenseCache
from tilewise.caches.latent import Latent as Latent
from tilewise.caches.paged import PagedCache as PagedCache
from tilewise.caches.quantized import Int8 as Int8
from tilewise.caches.recurrent import RecurrentCache as RecurrentCache
from tilewise.caches.rolling import RollingCache as RollingCache

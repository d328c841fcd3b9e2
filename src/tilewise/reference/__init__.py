"""The mathematics, readable: any device, float64-able, no kernel and no dispatch.

`softmax` (three ways, and the merge) · `standard` (whole and in six steps) · `flash` (versions 1 and 2, as tile loops)
· `flash_backward` (by recomputation) · `sparse` (gather and batched matmul) · `counters` (what the loops count).
"""

from tilewise.reference.counters import Counters as Counters
from tilewise.reference.flash import flash_v1 as flash_v1
from tilewise.reference.flash import flash_v2 as flash_v2
from tilewise.reference.flash_backward import flash_backward as flash_backward
from tilewise.reference.softmax import Partial as Partial
from tilewise.reference.softmax import merge as merge
from tilewise.reference.softmax import merge_sink as merge_sink
from tilewise.reference.softmax import online_attention as online_attention
from tilewise.reference.softmax import online_softmax as online_softmax
from tilewise.reference.softmax import safe_softmax as safe_softmax
from tilewise.reference.standard import six_step_attention as six_step_attention
from tilewise.reference.standard import standard_attention as standard_attention

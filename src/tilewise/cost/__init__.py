"""What attention costs, from sizes alone: FLOPs, bytes moved, bytes held, and what a device makes of them. No torch.

`counts` (FLOPs and HBM traffic) · `tiles` (what the tiled algorithms do) · `linear`, `sparse` (the other mechanisms) ·
`memory` (tensors, training, caches) · `peak` (each backend's peak) · `model` (a whole GPT) · `on_chip` (tile shapes) ·
`banks` (shared-memory conflicts) · `hardware` (devices, a source per number) · `roofline` (intensity against balance) ·
`calibration`, `prediction` (this machine as it was measured, and what that says of other shapes) · `advice` · `claims`,
`quoted`, `tables` (what people quote, beside what comes out) · `summary` (all of it for one problem).
"""

from tilewise.cost.advice import Advice as Advice
from tilewise.cost.advice import advise as advise
from tilewise.cost.banks import SharedTile as SharedTile
from tilewise.cost.banks import conflict_ways as conflict_ways
from tilewise.cost.counts import Flops as Flops
from tilewise.cost.counts import Traffic as Traffic
from tilewise.cost.counts import backward_flops as backward_flops
from tilewise.cost.counts import conventional_scores as conventional_scores
from tilewise.cost.counts import forward_flops as forward_flops
from tilewise.cost.counts import ideal_traffic as ideal_traffic
from tilewise.cost.counts import self_attention as self_attention
from tilewise.cost.counts import six_step_traffic as six_step_traffic
from tilewise.cost.counts import standard_traffic as standard_traffic
from tilewise.cost.counts import visible_scores as visible_scores
from tilewise.cost.hardware import DEVICES as DEVICES
from tilewise.cost.hardware import Device as Device
from tilewise.cost.hardware import measured as measured
from tilewise.cost.linear import linear_counts as linear_counts
from tilewise.cost.memory import AttentionMemory as AttentionMemory
from tilewise.cost.memory import attention_memory as attention_memory
from tilewise.cost.model import GPT as GPT
from tilewise.cost.model import MODELS as MODELS
from tilewise.cost.model import training_memory as training_memory
from tilewise.cost.on_chip import TileShape as TileShape
from tilewise.cost.on_chip import fitting_shapes as fitting_shapes
from tilewise.cost.peak import peak_bytes as peak_bytes
from tilewise.cost.prediction import Fit as Fit
from tilewise.cost.prediction import Prediction as Prediction
from tilewise.cost.prediction import predict as predict
from tilewise.cost.roofline import Placement as Placement
from tilewise.cost.roofline import Step as Step
from tilewise.cost.roofline import place as place
from tilewise.cost.sparse import sparse_counts as sparse_counts
from tilewise.cost.summary import Estimate as Estimate
from tilewise.cost.summary import estimate as estimate
from tilewise.cost.tiles import TiledCounts as TiledCounts
from tilewise.cost.tiles import flash_backward_counts as flash_backward_counts
from tilewise.cost.tiles import flash_v1_counts as flash_v1_counts
from tilewise.cost.tiles import flash_v2_counts as flash_v2_counts

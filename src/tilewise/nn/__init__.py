"""Modules: attention as layers of a model, with their weights, caches and conversions."""

from tilewise.nn.attention import GroupedQueryAttention as GroupedQueryAttention
from tilewise.nn.attention import MultiHeadAttention as MultiHeadAttention
from tilewise.nn.attention import MultiQueryAttention as MultiQueryAttention
from tilewise.nn.convert import from_deepseek as from_deepseek
from tilewise.nn.convert import from_gpt2 as from_gpt2
from tilewise.nn.convert import from_llama as from_llama
from tilewise.nn.convert import from_torch as from_torch
from tilewise.nn.convert import to_deepseek as to_deepseek
from tilewise.nn.convert import to_gpt2 as to_gpt2
from tilewise.nn.convert import to_llama as to_llama
from tilewise.nn.convert import to_torch as to_torch
from tilewise.nn.features import FavorFeatures as FavorFeatures
from tilewise.nn.latent import MultiHeadLatentAttention as MultiHeadLatentAttention
from tilewise.nn.linear import GatedLinearAttention as GatedLinearAttention
from tilewise.nn.linear import LinearAttention as LinearAttention
from tilewise.nn.linear import Retention as Retention
from tilewise.nn.linear import RWKV6TimeMix as RWKV6TimeMix
from tilewise.nn.rotary import RotaryEmbedding as RotaryEmbedding
from tilewise.nn.sparse import BigBirdAttention as BigBirdAttention
from tilewise.nn.sparse import LongformerAttention as LongformerAttention
from tilewise.nn.sparse import SparseAttention as SparseAttention
from tilewise.ops.rotary_scaling import NTK as NTK
from tilewise.ops.rotary_scaling import DynamicNTK as DynamicNTK
from tilewise.ops.rotary_scaling import LinearScaling as LinearScaling
from tilewise.ops.rotary_scaling import Llama3 as Llama3
from tilewise.ops.rotary_scaling import YaRN as YaRN

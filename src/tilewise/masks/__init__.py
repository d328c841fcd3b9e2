"""Masks as values that compile to tile maps. See docs/masks.md; nothing here imports torch until a device is named."""

from tilewise.masks.algebra import And, Mask, Not, Or, PerHead
from tilewise.masks.compiler import tile_map
from tilewise.masks.coverage import TILE
from tilewise.masks.patterns import Causal, Dilated, Prefix, Strided, Tree, Window
from tilewise.masks.sets import BigBird, Dense, Documents, Global, Longformer, Random, RandomTokens
from tilewise.masks.tilemap import TileMap
from tilewise.masks.tiles import FromTiles

__all__ = [
    "TILE",
    "And",
    "BigBird",
    "Causal",
    "Dense",
    "Dilated",
    "Documents",
    "FromTiles",
    "Global",
    "Longformer",
    "Mask",
    "Not",
    "Or",
    "PerHead",
    "Prefix",
    "Random",
    "RandomTokens",
    "Strided",
    "TileMap",
    "Tree",
    "Window",
    "tile_map",
]

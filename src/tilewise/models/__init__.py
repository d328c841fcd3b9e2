"""Small models of tilewise's own."""

from tilewise.models.generation import generate as generate
from tilewise.models.gpt import GPT as GPT
from tilewise.models.gpt import MECHANISMS as MECHANISMS
from tilewise.models.gpt import GPTConfig as GPTConfig
from tilewise.models.gpt2 import load_gpt2 as load_gpt2
from tilewise.models.gpt2 import save_gpt2 as save_gpt2

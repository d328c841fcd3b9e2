"""Training: text to tokens, tokens to batches, and a loop whose every state can be written down and taken up again."""

from tilewise.train.checkpoints import Checkpoint as Checkpoint
from tilewise.train.checkpoints import latest as latest
from tilewise.train.checkpoints import read as read
from tilewise.train.loop import Step as Step
from tilewise.train.loop import TrainConfig as TrainConfig
from tilewise.train.loop import Trainer as Trainer
from tilewise.train.processes import Processes as Processes
from tilewise.train.processes import joined as joined
from tilewise.train.shards import Shards as Shards
from tilewise.train.shards import prepare as prepare
from tilewise.train.tokenizers import Tokenizer as Tokenizer

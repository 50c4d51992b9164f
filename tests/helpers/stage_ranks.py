"""What torchrun starts in every process: a training stage, its only argument, of the working folder's config.pickle.

Not a test itself.
"""

import pickle
from pathlib import Path

from f2llm.pipeline import train_stage

if __name__ == "__main__":
    config = pickle.loads(Path("config.pickle").read_bytes())
    train_stage.load_config = lambda size: config
    train_stage.main()

"""What a learner has seen, and which batches it owes an update."""

from esscher.experience.offline import Dataset, OfflineReplay
from esscher.experience.replay import Replay
from esscher.experience.rollout import RolloutBuffer

__all__ = ["Dataset", "OfflineReplay", "Replay", "RolloutBuffer"]

"""One SAC update in SBX (JAX), end to end per step, for comparison with sac_speed.py.

Run it with a Python that has sbx-rl installed (it pins its own dependencies):

    OTHER_PYTHON benchmarks/sbx_speed.py
"""

import json
import sys
import time

import gymnasium
from sbx import SAC
from stable_baselines3.common.callbacks import BaseCallback

WARMUP, SETTLE = 500, 500


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == WARMUP + SETTLE:
                self.began = time.perf_counter()
            if self.num_timesteps == WARMUP + SETTLE + steps:
                self.ended = time.perf_counter()
            return True

    model = SAC("MlpPolicy", gymnasium.make("HalfCheetah-v5"), learning_starts=WARMUP, seed=0)
    clock = Clock()
    model.learn(WARMUP + SETTLE + steps, callback=clock)
    print(json.dumps((clock.ended - clock.began) / steps * 1e3))


if __name__ == "__main__":
    main()

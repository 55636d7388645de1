"""The state of a MuJoCo simulation as one vector, and back."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def take(model: Any, data: Any) -> NDArray[np.float64]:
    """All that the next steps depend on."""
    import mujoco as library

    mujoco: Any = library
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    return state


def put(model: Any, data: Any, state: NDArray[np.float64]) -> None:
    """The inverse of `take`; what follows from the state is computed anew."""
    import mujoco as library

    mujoco: Any = library
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(model, data, state, kind)
    mujoco.mj_forward(model, data)
    # Computing what follows changes where the next step's solver starts from.
    mujoco.mj_setState(model, data, state, kind)

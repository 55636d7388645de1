"""Tasks of Meta-World: a Sawyer arm on a table, with the library's scripted experts.

Pictures are drawn in software where there is no display, which takes far longer than a step of the
simulation: nothing is drawn before somebody asks. Shadows, reflections and multisampling are left
out, since they take nine tenths of the time and say little at the sizes that policies see.
"""

import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esscher.adapters.imports import needed
from esscher.adapters.robots import Outcome
from esscher.errors import UserError, nearest, require

CLOSE = "close"
"""A camera of our own, for small images: from over the robot's shoulder, half as far away."""

CLOSE_VIEW = {"lookat": (0.0, 0.7, 0.1), "distance": 1.2, "azimuth": 135.0, "elevation": -35.0}
"""Where it looks, from how far (metres) and from where (degrees)."""

HAND = 4
"""Leading entries of an observation that are of the robot itself: its hand and gripper."""


class MetaWorldTask:
    """One task, such as metaworld:reach-v3; the goal and the objects' places follow from the seed.

    Args:
        task: its name in Meta-World.
        cameras: of MuJoCo's model (corner, corner2, corner3, corner4, topview, behindGripper,
            gripperPOV), or close.
        size: of an image, rows and columns.
        full_state: the whole observation of 39 entries, which holds the objects and the goal as well;
            otherwise only the position of the hand (metres) and how far the gripper is open.
        max_steps: after which an episode is truncated, at most Meta-World's own 500.

    Raises:
        UserError: Meta-World is not installed, there is no such task or camera, or a value is out of
            range.
    """

    action_low = (-1.0,) * 4
    action_high = (1.0,) * 4
    """Movement of the hand along three axes, and the gripper's effort."""
    fps = 80

    def __init__(
        self,
        task: str,
        *,
        cameras: Sequence[str] = (),
        size: tuple[int, int] | None = None,
        full_state: bool = False,
        max_steps: int = 500,
    ):
        self.name, self.instruction = f"metaworld:{task}", instruction_of(task)
        self._env, self._policy = _made(task)
        self._box = self._env.sawyer_observation_space
        self.cameras = tuple(cameras) or (CLOSE,)
        self.image_size = size or (64, 64)
        self._full = full_state
        self.state_dim = self._box.shape[0] if full_state else HAND
        self.max_steps = max_steps
        limit = self._env.max_path_length
        require("max_steps", max_steps, 1 <= max_steps <= limit, f"in [1, {limit}]")
        require("images", list(self.image_size), min(self.image_size) >= 8, "at least 8 x 8")
        model = self._env.model
        known = [model.camera(k).name for k in range(model.ncam)] + [CLOSE]
        for camera in self.cameras:
            if camera not in known:
                raise UserError(f"{self.name} has no camera {camera!r}: {nearest(camera, known)}")
        self._renderer: Any = None
        self.reset(0)

    def reset(self, seed: int) -> None:
        self._env.seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium's, about the way in which tasks restart.
            self._obs = self._env.reset()[0]
        # A task moves its goal after the last of its own calls, and pictures would show the old one.
        mujoco = _mujoco()
        mujoco.mj_kinematics(self._env.model, self._env.data)
        mujoco.mj_camlight(self._env.model, self._env.data)
        self._steps = 0

    def images(self) -> NDArray[np.uint8]:
        """What the cameras see now: c h w 3.

        Raises:
            UserError: this machine cannot draw.
        """
        if self._renderer is None:
            self._renderer = _Renderer(self._env.model, self.image_size)
        return np.stack([self._renderer.draw(self._env.data, camera) for camera in self.cameras])

    def state(self) -> NDArray[np.float32]:
        return self._obs[: self.state_dim].astype(np.float32)

    def step(self, action: NDArray[Any]) -> Outcome:
        action = np.clip(np.asarray(action, np.float32), -1, 1)
        self._obs, reward, _, _, info = self._env.step(action)
        self._steps += 1
        return Outcome(
            reward=float(reward),
            success=bool(info["success"]),
            terminated=False,
            truncated=self._steps >= self.max_steps,
        )

    def expert(self) -> NDArray[np.float32]:
        """What Meta-World's scripted policy would do now; it knows the objects and the goal."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About actions out of the box, which are clipped.
            action = self._policy.get_action(self._obs)
        return np.clip(action, -1, 1).astype(np.float32)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._env.close()


def instruction_of(task: str) -> str:
    """The words of a task's name: button-press-topdown-v3 is "button press topdown"."""
    return re.sub(r"-v\d+$", "", task).replace("-", " ")


def _made(task: str) -> tuple[Any, Any]:
    """A task whose goal is drawn anew at each reset and is part of the observation; its expert."""
    _mujoco()
    metaworld = needed("metaworld", f"metaworld:{task}", "robots")
    known = metaworld.ALL_V3_ENVIRONMENTS
    if task not in known:
        raise UserError(f"Meta-World has no task {task!r}: {nearest(task, known)}")
    experts = needed("metaworld.policies", f"metaworld:{task}", "robots").ENV_POLICY_MAP
    env = known[task]()
    env.__dict__.pop("sawyer_observation_space", None)  # Cached, with the goal hidden.
    env._partially_observable = False
    env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
    return env, experts[task]()


def _mujoco() -> Any:
    """MuJoCo, whose import already looks for a way to draw where MUJOCO_GL names one."""
    try:
        return needed("mujoco", "Meta-World", "robots")
    except UserError:
        raise
    except Exception as error:  # OpenGL's own, of many kinds.
        raise _cannot_draw(error) from error


class _Renderer:
    """Draws what a camera sees, upright.

    MuJoCo's own Renderer would not end quietly where a machine cannot draw.
    """

    def __init__(self, model: Any, size: tuple[int, int]):
        self._mujoco = mujoco = _mujoco()
        self._model, self._size = model, size
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        model.vis.global_.offheight, model.vis.global_.offwidth = size
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of a window system that is not there.
                self._context = mujoco.GLContext(size[1], size[0])
                self._context.make_current()
                self._drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # OpenGL's own, of many kinds.
            raise _cannot_draw(error) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._drawing)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._options, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        flags = mujoco.mjtRndFlag
        self._off = int(flags.mjRND_SHADOW), int(flags.mjRND_REFLECTION)

    def draw(self, data: Any, camera: str) -> NDArray[np.uint8]:
        """One image, h w 3."""
        mujoco, view = self._mujoco, self._camera
        view.type = mujoco.mjtCamera.mjCAMERA_FREE
        if camera == CLOSE:
            for name, value in CLOSE_VIEW.items():
                setattr(view, name, value)
        else:
            view.type = mujoco.mjtCamera.mjCAMERA_FIXED
            view.fixedcamid = self._model.camera(camera).id
        self._context.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            self._model, data, self._options, None, view, everything, self._scene
        )
        for flag in self._off:
            self._scene.flags[flag] = 0
        image = np.empty((*self._size, 3), np.uint8)
        area = mujoco.MjrRect(0, 0, self._size[1], self._size[0])
        mujoco.mjr_render(area, self._scene, self._drawing)
        mujoco.mjr_readPixels(image, None, area, self._drawing)
        # OpenGL counts rows from below; some of the model's cameras hang upside down besides.
        hangs = camera != CLOSE and data.camera(camera).xmat[7] < -0.1
        return image[:, ::-1].copy() if hangs else image[::-1].copy()

    def close(self) -> None:
        self._context.make_current()
        self._drawing.free()
        self._context.free()


def _cannot_draw(error: Exception) -> UserError:
    chosen = os.environ.get("MUJOCO_GL")
    tried = f"with MUJOCO_GL={chosen}" if chosen else "without MUJOCO_GL"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"images cannot be drawn here {tried} ({reason}): set MUJOCO_GL=osmesa with the Debian package "
        "libosmesa6 installed (in software), or MUJOCO_GL=egl with libegl1 (a graphics card)"
    )

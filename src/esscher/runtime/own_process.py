"""What a process that only does Esscher's work sets for itself."""

import gc


def collect_seldom() -> None:
    """Look for unreachable cycles less often than Python does by itself.

    Hundreds of thousands of objects that libraries create as they are imported stay to the end, and to
    look through them again and again takes a fifth of the time until the first step.
    """
    gc.set_threshold(50_000, 10, 10)

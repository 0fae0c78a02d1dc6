"""Import alias: the official Quick Start finds this function here. It lives in `patch.quickstart`."""

from patch.quickstart import learn_mask

__all__ = ["learn_mask"]

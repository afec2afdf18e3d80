"""What these tests need is asked for in ``promised``: `conftest` is whichever conftest.py was imported last."""

from __future__ import annotations

from promised import PROMISED, absent, need_package

__all__ = ["PROMISED", "absent", "need_package"]
